"""What is common to all readers: a question becomes a row, and rows become logits.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

BATCH_TOKENS = 4096  # padding included, that a model reads at once; an image is one


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
        counts = [len(question.choices) for question in questions]
        logits_NC = read_all(self.reader, model, rows, max(counts))
        return [
            Scores(tuple(values[:count]), (1,) * count)
            for values, count in zip(logits_NC.tolist(), counts, strict=True)
        ]


def read_all(reader: Reader, model: Any, rows: Sequence[Row], width: int | None = None) -> Tensor:
    """Logits `[N, width]` of any number of inputs; like sizes are read together.

    width: the largest number of choices; None where all reads give the same.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].size)
    parts = []
    for batch in _batches(order, rows):
        logits_NC = reader.read(model, [rows[i] for i in batch])
        missing = 0 if width is None else width - logits_NC.shape[1]
        parts.append(torch.nn.functional.pad(logits_NC, (0, missing), value=float("-inf")))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    return torch.cat(parts)[back]


def _batches(order: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
    """Inputs in order of size, cut where they, padding included, exceed the tokens allowed."""
    batch: list[int] = []
    for index in order:
        if batch and rows[index].size * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


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
