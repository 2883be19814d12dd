"""Scores of choices by a causal language model: the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.graph_memory import BATCH_POSITIONS
from experthub.hub.readers.logprobs import count_positions, sum_logprobs
from experthub.hub.readers.reader import ReadsPrompt
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.readers.tokens import Encoded, encode
from experthub.hub.readers.window import Window

__all__ = ["LIKELIHOOD_BATCH_TOKENS", "Encoded", "Likelihood", "encode", "score_choices"]

LIKELIHOOD_BATCH_TOKENS = BATCH_POSITIONS


@dataclass(frozen=True)
class Likelihood(ReadsPrompt):
    """A scorer by the log-probabilities of the choices' tokens after the prompt."""

    tokenizer: Any
    window: Window = field(default_factory=Window)
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
            encoded = encode(self.tokenizer, question.text, question.choices, self.window)
            items += encoded
            owner += [index] * len(encoded)
        sums: list[list[float]] = [[] for _ in questions]
        tokens: list[list[int]] = [[] for _ in questions]
        for index, item, values in zip(owner, items, score_choices(model, items), strict=True):
            sums[index] += values
            tokens[index] += map(len, item.choices)
        return [Scores(tuple(s), tuple(t)) for s, t in zip(sums, tokens, strict=True)]


@torch.no_grad()
def score_choices(
    model: Any,
    items: Sequence[Encoded],
    *,
    batch_tokens: int = LIKELIHOOD_BATCH_TOKENS,
) -> list[list[float]]:
    """Sum the log-probabilities of every choice's tokens, without gradients.

    The prompts of a batch run once with a key/value cache. Then the choices run, each with a copy
    of its prompt's cache. Prompts of similar length share a batch to keep padding small. The logits
    of a forward pass take at most `count_logits_bytes`.

    Args:
        model: The causal language model.
        items: The prompts with their choices.
        batch_tokens: The largest number of tokens of a batch, with padding.

    Returns:
        The sums of every item's choices, in nats, in the order of the items.
    """
    scores: list[list[float]] = [[] for _ in items]
    for batch in _batches(items, batch_tokens, count_positions(model)):
        chosen = [items[i] for i in batch]
        with explain_forward_errors(model):
            values = iter(sum_logprobs(model, chosen).tolist())
        for index, item in zip(batch, chosen, strict=True):
            scores[index] = [next(values) for _ in item.choices]
    return scores


def _batches(items: Sequence[Encoded], batch_tokens: int, positions: int) -> Iterator[list[int]]:
    """Group items by length into batches whose prompts and choices have few enough tokens."""
    batch: list[int] = []
    rows = longest = 0
    for index in sorted(range(len(items)), key=lambda i: len(items[i].prompt)):
        item = items[index]
        width = max(longest, *map(len, item.choices))
        prompts, choices = len(item.prompt) * (len(batch) + 1), width * (rows + len(item.choices))
        # Each prompt has logits at one position.
        if batch and (max(prompts, choices) > batch_tokens or len(batch) >= positions):
            yield batch
            batch, rows, width = [], 0, max(map(len, item.choices))
        batch.append(index)
        rows, longest = rows + len(item.choices), width
    if batch:
        yield batch
