"""Batches of inputs for readers, of similar size, and with gradients of bounded memory.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.graph_memory import GRAPH_BYTES, count_graph_bytes, count_patches
from experthub.hub.readers.reader import Reader, Row
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BATCH_TOKENS = 4096  # Tokens of a batch, with padding; an image counts as one token.


class ReaderScorer:
    """A scorer that uses the logits of a reader, without gradients."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.name = reader, reader.name

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The question of the reader.
        """
        return self.reader.question(task, example)

    @torch.no_grad()
    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The model to evaluate.
            questions: The questions.

        Returns:
            The logits of every question's choices; each choice counts as one token.
        """
        rows = [self.reader.row(question) for question in questions]
        counts = [len(question.choices) for question in questions]
        logits_NC = read_all(self.reader, model, rows, max(counts))
        return [
            Scores(tuple(values[:count]), (1,) * count)
            for values, count in zip(logits_NC.tolist(), counts, strict=True)
        ]


def read_all(reader: Reader, model: Any, rows: Sequence[Row], width: int | None = None) -> Tensor:
    """Compute the logits of any number of inputs; inputs of similar size share a batch.

    Args:
        reader: The reader.
        model: The model.
        rows: The prepared questions.
        width: The largest number of choices; None if all batches have the same number.

    Returns:
        Logits `[N, width]` in the order of the rows, on the device of the model. With gradients,
        inputs that would keep much memory are read again in the backward pass.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].size)
    batches, whole = _batches(order, rows), reader.read
    if torch.is_grad_enabled():
        batches = _batches_with_gradients(order, rows, model.config.to_dict())
        if len(batches) > 1:
            whole = partial(checkpoint, reader.read, use_reentrant=False)
    parts = []
    for batch in batches:
        with explain_forward_errors(model):
            logits_NC = whole(model, [rows[i] for i in batch])
            if len({rows[i].size for i in batch}) > 1 and bool(logits_NC.isnan().any()):
                # Padding that attends to no token is NaN in some models, and NaN spreads.
                alone = [whole(model, [rows[i]]) for i in batch]
                logits_NC = torch.cat([_widen(one, logits_NC.shape[1]) for one in alone])
        parts.append(_widen(logits_NC, logits_NC.shape[1] if width is None else width))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    return torch.cat(parts)[back]


def _widen(logits_NC: Tensor, width: int) -> Tensor:
    """Pad logits with minus infinity to a number of choices."""
    return torch.nn.functional.pad(logits_NC, (0, width - logits_NC.shape[1]), value=float("-inf"))


def _batches(order: Sequence[int], rows: Sequence[Row]) -> list[list[int]]:
    """Group inputs by size into batches of at most `BATCH_TOKENS` tokens with padding."""
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and rows[index].size * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _batches_with_gradients(
    order: Sequence[int], rows: Sequence[Row], config: Mapping[str, Any]
) -> list[list[int]]:
    """Group inputs by size into batches that keep at most `GRAPH_BYTES` for the backward pass.

    If all batches together keep no more, the model reads them as without gradients.
    """

    def count(chosen: Sequence[int]) -> int:
        answers = sum(rows[i].answers for i in chosen)
        tokens = sum(rows[i].size if rows[i].size > 1 else patches for i in chosen)
        return count_graph_bytes(config, tokens + answers, answers)

    patches = count_patches(config)
    batches = _batches(order, rows)
    if count(order) <= GRAPH_BYTES:
        return batches
    found: list[list[int]] = []
    for batch in batches:
        found.append([])
        for index in batch:
            if found[-1] and count([*found[-1], index]) > GRAPH_BYTES:
                found.append([])
            found[-1].append(index)
    return found
