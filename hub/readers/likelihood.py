"""Log-likelihoods of choices under a causal language model, which reads each prompt once.

Shapes: B prompts or choices in a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.readers.reader import ReadsPrompt, pad, repeat_rows
from experthub.hub.readers.scorer import Question, Scores
from torch import Tensor

LIKELIHOOD_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Likelihood(ReadsPrompt):
    """A scorer by the log-probabilities of the choices' tokens after the prompt."""

    tokenizer: Any
    name = "logprob"
    separator = " "

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The causal language model.
            questions: The questions.

        Returns:
            The summed log-probabilities and the number of tokens of every question's choices.
        """
        items, owner = [], []
        for index, question in enumerate(questions):
            encoded = encode(self.tokenizer, question.text, question.choices)
            items += encoded
            owner += [index] * len(encoded)
        sums: list[list[float]] = [[] for _ in questions]
        tokens: list[list[int]] = [[] for _ in questions]
        for index, item, values in zip(owner, items, score_choices(model, items), strict=True):
            sums[index] += values
            tokens[index] += map(len, item.choices)
        return [Scores(tuple(s), tuple(t)) for s, t in zip(sums, tokens, strict=True)]


@dataclass(frozen=True)
class Encoded:
    """The token ids of a prompt and of its choices, which follow the prompt."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def encode(tokenizer: Any, prompt: str, choices: Sequence[str]) -> list[Encoded]:
    """Tokenise a prompt and its choices in the way of lm-evaluation-harness.

    Prompt and choice are tokenised together. If the prompt alone has n tokens, the tokens after the
    first n belong to the choice. White space at the end of the prompt belongs to the choice. The
    prompt keeps its own tokens even if a choice merges with its last token.

    Args:
        tokenizer: The tokenizer of the model.
        prompt: The text before the choices.
        choices: The texts that follow it.

    Returns:
        One item for all choices. If a choice adds no token, there is one item per choice instead,
        and the last token counts as the choice.
    """
    own = tuple(tokenizer(prompt.rstrip() or prompt)["input_ids"])
    whole = [tuple(ids) for ids in tokenizer([prompt + choice for choice in choices])["input_ids"]]
    if all(len(ids) > len(own) for ids in whole):
        return [Encoded(own, tuple(ids[len(own) :] for ids in whole))]
    return [
        Encoded(own, (ids[len(own) :],)) if len(ids) > len(own) else Encoded(ids[:-1], (ids[-1:],))
        for ids in whole
    ]


@torch.no_grad()
def score_choices(
    model: Any,
    items: Sequence[Encoded],
    *,
    batch_tokens: int = LIKELIHOOD_BATCH_TOKENS,
) -> list[list[float]]:
    """Sum the log-probabilities of every choice's tokens, without gradients.

    The prompts of a batch run once with a key/value cache. Then the choices run, each with a copy
    of its prompt's cache. Prompts of similar length share a batch to keep padding small.

    Args:
        model: The causal language model.
        items: The prompts with their choices.
        batch_tokens: The largest number of tokens of a batch, with padding.

    Returns:
        The sums of every item's choices, in nats, in the order of the items.
    """
    scores: list[list[float]] = [[] for _ in items]
    for batch in _batches(items, batch_tokens):
        chosen = [items[i] for i in batch]
        values = iter(sum_logprobs(model, chosen).tolist())
        for index, item in zip(batch, chosen, strict=True):
            scores[index] = [next(values) for _ in item.choices]
    return scores


def _batches(items: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Group items by length into batches whose prompts and choices have few enough tokens."""
    batch: list[int] = []
    rows = longest = 0
    for index in sorted(range(len(items)), key=lambda i: len(items[i].prompt)):
        item = items[index]
        width = max(longest, *map(len, item.choices))
        prompts, choices = len(item.prompt) * (len(batch) + 1), width * (rows + len(item.choices))
        if batch and max(prompts, choices) > batch_tokens:
            yield batch
            batch, rows, width = [], 0, max(map(len, item.choices))
        batch.append(index)
        rows, longest = rows + len(item.choices), width
    if batch:
        yield batch


def sum_logprobs(
    model: Any, items: Sequence[Encoded], on_mask: Callable[[Tensor], None] = lambda mask: None
) -> Tensor:
    """Sum the log-probabilities of every choice's tokens in one batch, with gradients.

    Args:
        model: The causal language model.
        items: The prompts with their choices.
        on_mask: A function that is called with the mask of a batch, which is false for padding,
            before the model reads it.

    Returns:
        One sum for each choice, in nats, item after item.
    """
    device = next(model.parameters()).device
    prompts, real = pad([item.prompt for item in items], device, left=True)
    on_mask(real)
    prompt_mask = real.long()
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=prompts,
        attention_mask=prompt_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    first = read.logits[:, -1].float().log_softmax(-1)  # These predict the first token of a choice.
    choices = [choice for item in items for choice in item.choices]
    rows = repeat_rows([len(item.choices) for item in items], device)
    heads = torch.tensor([choice[0] for choice in choices], device=device)
    sums: Tensor = first[rows, heads]
    if max(map(len, choices)) > 1:
        cache = read.past_key_values
        sums = sums + _sum_remaining_logprobs(model, cache, choices, rows, prompt_mask, on_mask)
    return sums


def _sum_remaining_logprobs(
    model: Any,
    cache: Any,
    choices: Sequence[tuple[int, ...]],
    rows: Tensor,
    prompt_mask: Tensor,
    on_mask: Callable[[Tensor], None],
) -> Tensor:
    """Sum the log-probabilities of every choice's tokens after the first."""
    cache.batch_select_indices(rows)
    inputs, real = pad([choice[:-1] for choice in choices], rows.device)
    targets, _ = pad([choice[1:] for choice in choices], rows.device)
    start = prompt_mask.sum(1)[rows]
    steps = torch.arange(inputs.shape[1], device=rows.device)
    on_mask(real)
    logits = model(
        input_ids=inputs,
        attention_mask=torch.cat([prompt_mask[rows], real.long()], dim=1),
        position_ids=start[:, None] + steps,
        past_key_values=cache,
        use_cache=True,
    ).logits
    chosen: Tensor = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (chosen * real).sum(1)
