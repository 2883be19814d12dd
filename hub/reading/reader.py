"""What is common to all readers: a question becomes a row, and rows become logits.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from experthub.hub.scoring.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

BATCH = 32


class Row(Protocol):
    """One input as a model reads it.  size: how much there is to read; like sizes share a batch."""

    @property
    def size(self) -> int: ...

    def varied(self, seed: int) -> Row:
        """A random variation of the input, which a right answer survives."""
        ...


class Reader(Protocol):
    """How inputs of a kind of base become logits.

    name: of what the logits are.  real: which positions `[N, T]` of what the model reads at this
    moment are no padding; None if all are.
    """

    name: str
    real: Tensor | None

    def question(self, task: Task, example: Example) -> Question: ...

    def row(self, question: Question) -> Any: ...

    def read(self, model: Any, rows: Sequence[Any]) -> Tensor:
        """Logits `[N, C]`, minus infinity where a row has fewer choices than C."""
        ...


class ReaderScorer:
    """Scores choices by a reader's logits, without gradients; see `scoring.scorer.Scorer`."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.name = reader, reader.name

    def question(self, task: Task, example: Example) -> Question:
        return self.reader.question(task, example)

    @torch.no_grad()
    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        rows = [self.reader.row(question) for question in questions]
        order = sorted(range(len(rows)), key=lambda i: rows[i].size)
        found: list[Scores] = [Scores((), ())] * len(rows)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            logits_NC = self.reader.read(model, [rows[i] for i in part])
            for i, values in zip(part, logits_NC.tolist(), strict=True):
                count = len(questions[i].choices)
                found[i] = Scores(tuple(values[:count]), (1,) * count)
        return found


def by_row(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Values of all rows' choices, one after the other, as `[N, C]`."""
    parts = torch.split(values, list(counts))
    return torch.nn.utils.rnn.pad_sequence(
        list(parts), batch_first=True, padding_value=float("-inf")
    )


def selected(logits_NL: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """The logits of each row's own labels, out of those of all labels."""
    owner = torch.tensor([i for i, own in enumerate(columns) for _ in own])
    chosen = torch.tensor([column for own in columns for column in own])
    values = logits_NL[owner.to(logits_NL.device), chosen.to(logits_NL.device)]
    return by_row(values, [len(own) for own in columns])


def padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids, right-padded, `[N, T]`, and which are real."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids_NT = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True
    ).to(device)
    return ids_NT, torch.arange(ids_NT.shape[1], device=device) < lengths[:, None]
