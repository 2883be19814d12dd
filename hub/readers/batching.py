"""Batches of inputs for readers, of similar size, and with gradients of bounded memory.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.graph_memory import group_rows
from experthub.hub.readers.reader import Reader, Row
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    learns, whole = torch.is_grad_enabled(), reader.read
    answers = [row.answers for row in rows] if learns else None
    config = model.config.to_dict() if learns else {}
    batches = group_rows([row.size for row in rows], answers, config)
    if learns and len(batches) > 1:
        whole = partial(_read_twice, reader)
    order = [index for batch in batches for index in batch]
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


def _read_twice(reader: Reader, model: Any, rows: Sequence[Row]) -> Tensor:
    """Compute logits that keep nothing, and compute them again in the backward pass.

    The first pass builds no graph. The nodes of a graph would stay in memory between blocks that are
    freed, and the allocator could not join these blocks for the next batch.
    """
    device = next(model.parameters()).device
    # The only input with a gradient; those of the model's parameters are set beside it.
    wanted = torch.zeros((), device=device, requires_grad=True)
    again: Tensor = checkpoint(lambda _: reader.read(model, rows), wanted, use_reentrant=True)
    return again


def _widen(logits_NC: Tensor, width: int) -> Tensor:
    """Pad logits with minus infinity to a number of choices."""
    return torch.nn.functional.pad(logits_NC, (0, width - logits_NC.shape[1]), value=float("-inf"))
