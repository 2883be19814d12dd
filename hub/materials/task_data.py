"""A recipe's data as a learned merge sees it.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from experthub.hub.readers.reader import Reader, Row, read_all
from experthub.hub.tasks.task import Chosen
from torch import Tensor


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
            own[i] if view == 0 else own[i].vary(view)
            for own, chosen in zip(self.rows, rows, strict=True)
            for i in chosen.tolist()
        ]
        logits_NC = read_all(self.reader, self.model, picked, max(self.widths))
        found = torch.split(logits_NC, [len(chosen) for chosen in rows])
        return [part[:, :own] for part, own in zip(found, self.widths, strict=True)]
