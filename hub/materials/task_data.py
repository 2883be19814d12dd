"""The data of a recipe, as methods that learn see it.

Shapes: N inputs, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from experthub.hub.readers.batching import read_all
from experthub.hub.readers.reader import Reader, Row
from experthub.hub.tasks.task import Chosen
from torch import Tensor


def prepare_rows(reader: Reader, chosen: Chosen) -> tuple[list[Row], int]:
    """Prepare the examples of a task for a model.

    Args:
        reader: The reader of the base.
        chosen: The task with the chosen examples.

    Returns:
        The prepared examples, and the largest number of choices of an example.
    """
    questions = [reader.question(chosen.task, example) for example in chosen.examples]
    width = max(len(chosen.task.list_choices(example)) for example in chosen.examples)
    return [reader.row(question) for question in questions], width


class TaskData:
    """Inputs of tasks and a model that reads them, which implement `experthub.merge.Data`.

    The labels are the only trace of the right answers, and are None unless the method needs them.

    Args:
        model: The model that computes logits.
        reader: The reader of the base.
        chosen: The tasks with the chosen examples.
        labelled: Whether the method may see the labels.
        held_out: Other examples of the same tasks, on which early stopping is decided.
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
        prepared = [prepare_rows(reader, one) for one in chosen]
        self.rows, self.widths = [rows for rows, _ in prepared], [width for _, width in prepared]
        self.sizes = [len(rows) for rows in self.rows]
        device = next(model.parameters()).device
        self.labels = (
            [torch.tensor(one.labels, device=device) for one in chosen] if labelled else None
        )

    @property
    def real(self) -> Tensor | None:
        """A mask of the positions of the current batch that are not padding; None means all."""
        return self.reader.real

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        """Compute the logits of some inputs of each task.

        All tasks are read together, sorted by length, so that there is little padding and one
        backward pass is enough.

        Args:
            rows: One tensor of input numbers per task; it may be empty.
            view: 0 reads the inputs as they are. Another number reads a random variation of them,
                which depends on this number and on the input alone.

        Returns:
            Logits `[len(rows[t]), C]` per task `t`.
        """
        picked = [
            own[i] if view == 0 else own[i].vary(view)
            for own, chosen in zip(self.rows, rows, strict=True)
            for i in chosen.tolist()
        ]
        logits_NC = read_all(self.reader, self.model, picked, max(self.widths))
        found = torch.split(logits_NC, [len(chosen) for chosen in rows])
        return [part[:, :own] for part, own in zip(found, self.widths, strict=True)]
