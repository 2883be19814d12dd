"""A recipe's data as a learned merge sees it.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from experthub.hub.learning.examples import Chosen
from experthub.hub.reading.reader import Reader, Row
from torch import Tensor

BATCH_TOKENS = 4096  # padding included, that a model reads at once; an image is one


class TaskData:
    """Inputs of tasks, and a model that reads them; see `merge.Data`.

    Labels are handed over only where the recipe allows it and the method asks: nothing else of
    the right answers is kept.
    """

    def __init__(
        self,
        model: Any,
        reader: Reader,
        chosen: Sequence[Chosen],
        labelled: bool,
        held_out: TaskData | None = None,
    ) -> None:
        self.model, self.reader, self.held_out = model, reader, held_out
        self.tasks = [one.task.reference for one in chosen]
        self.rows: list[list[Row]] = [
            [reader.row(reader.question(one.task, e)) for e in one.examples] for one in chosen
        ]
        self.sizes = [len(rows) for rows in self.rows]
        self.labels = [torch.tensor(one.labels) for one in chosen] if labelled else None
        self.widths = [
            max(len(one.task.choices(example)) for example in one.examples) for one in chosen
        ]

    @property
    def real(self) -> Tensor | None:
        return self.reader.real

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        """All tasks in one go, like lengths together: padding is small, and one backward is enough."""
        picked = [
            own[i] if view == 0 else own[i].varied(view)
            for own, chosen in zip(self.rows, rows, strict=True)
            for i in chosen.tolist()
        ]
        order = sorted(range(len(picked)), key=lambda i: picked[i].size)
        width = max(self.widths)
        parts = [
            _wide(self.reader.read(self.model, [picked[i] for i in batch]), width)
            for batch in _batches(order, picked)
        ]
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        found = torch.split(torch.cat(parts)[back], [len(chosen) for chosen in rows])
        return [part[:, :own] for part, own in zip(found, self.widths, strict=True)]


def _wide(logits_NC: Tensor, width: int) -> Tensor:
    missing = width - logits_NC.shape[1]
    return torch.nn.functional.pad(logits_NC, (0, missing), value=float("-inf"))


def _batches(order: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
    """Inputs in order of length, cut where they, padding included, exceed the tokens allowed."""
    batch: list[int] = []
    for index in order:
        if batch and rows[index].size * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
