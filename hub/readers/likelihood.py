"""Log-likelihoods of answer choices under a causal language model, each prompt read once.

Shapes: B prompts or choices in a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Likelihood:
    """Scores choices by the log-probabilities of their tokens after the prompt."""

    tokenizer: Any
    name = "logprob"

    def question(self, task: Task, example: Example) -> Question:
        return Question(task.prompt(example), tuple(" " + c for c in task.choices(example)))

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        items, owner = [], []
        for index, question in enumerate(questions):
            encoded = encode(self.tokenizer, question.text, question.choices)
            items += encoded
            owner += [index] * len(encoded)
        sums: list[list[float]] = [[] for _ in questions]
        tokens: list[list[int]] = [[] for _ in questions]
        for index, item, values in zip(owner, items, choice_logprobs(model, items), strict=True):
            sums[index] += values
            tokens[index] += map(len, item.choices)
        return [Scores(tuple(s), tuple(t)) for s, t in zip(sums, tokens, strict=True)]


@dataclass(frozen=True)
class Encoded:
    """One prompt with its choices, as token ids; the choices' ids follow the prompt's."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def encode(tokenizer: Any, prompt: str, choices: Sequence[str]) -> list[Encoded]:
    """Token ids as lm-evaluation-harness takes them: those of prompt + choice after as many as the
    prompt has; white space at the prompt's end counts as the choice's.

    The prompt keeps its own ids even where a choice merges with its last token.  One item for all
    choices; one each where a choice would be left without a token: there it is the last one.
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
def choice_logprobs(
    model: Any,
    items: Sequence[Encoded],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[float]]:
    """Summed log-probability of every choice's tokens, in the order given.

    The prompts of a batch run once with a key/value cache; then their choices, each on its own
    copy of its prompt's cache.  Prompts of like length share a batch, so that padding is small.

    batch_tokens: tokens, padding included, that run at once.
    """
    scores: list[list[float]] = [[] for _ in items]
    for batch in _batches(items, batch_tokens):
        chosen = [items[i] for i in batch]
        values = iter(choice_sums(model, chosen).tolist())
        for index, item in zip(batch, chosen, strict=True):
            scores[index] = [next(values) for _ in item.choices]
    return scores


def _batches(items: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Items by length, cut where prompts or choices, padding included, exceed the tokens allowed."""
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


def choice_sums(
    model: Any, items: Sequence[Encoded], reading: Callable[[Tensor], None] = lambda mask: None
) -> Tensor:
    """Summed log-probability of every choice's tokens, item after item, as one batch; differentiable.

    reading: is told which positions are no padding, before each time that the model reads.
    """
    device = next(model.parameters()).device
    prompts, prompt_mask = _padded([item.prompt for item in items], left=True, device=device)
    reading(prompt_mask)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=prompts,
        attention_mask=prompt_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    first = read.logits[:, -1].float().log_softmax(-1)  # of every choice's first token
    owner = [row for row, item in enumerate(items) for _ in item.choices]
    choices = [choice for item in items for choice in item.choices]
    rows = torch.tensor(owner, device=device)
    heads = torch.tensor([choice[0] for choice in choices], device=device)
    sums: Tensor = first[rows, heads]
    if max(map(len, choices)) > 1:
        sums = sums + _rest(model, read.past_key_values, choices, rows, prompt_mask, reading)
    return sums


def _rest(
    model: Any,
    cache: Any,
    choices: Sequence[tuple[int, ...]],
    rows: Tensor,
    prompt_mask: Tensor,
    reading: Callable[[Tensor], None],
) -> Tensor:
    """Summed log-probability of the tokens after the first, for every choice."""
    cache.batch_select_indices(rows)
    inputs, mask = _padded([choice[:-1] for choice in choices], left=False, device=rows.device)
    targets, _ = _padded([choice[1:] for choice in choices], left=False, device=rows.device)
    start = prompt_mask.sum(1)[rows]
    steps = torch.arange(inputs.shape[1], device=rows.device)
    reading(mask)
    logits = model(
        input_ids=inputs,
        attention_mask=torch.cat([prompt_mask[rows], mask], dim=1),
        position_ids=start[:, None] + steps,
        past_key_values=cache,
        use_cache=True,
    ).logits
    chosen: Tensor = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (chosen * mask).sum(1)


def _padded(rows: Sequence[Sequence[int]], *, left: bool, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]` and their mask; padding carries the id 0 and is never attended to."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)
