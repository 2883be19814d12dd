"""What a learned merge is given: data and a model that reads it, or what it found before.

Shapes: N inputs of a task, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from experthub.merge._coefficients import Coefficients
from torch import Tensor, nn

State = Mapping[str, Tensor]


class Data(Protocol):
    """Inputs of one or more tasks, and the model that reads them.

    model: the base, whose weights a merge may set while it learns.  tasks: their names.  sizes: N
    of each.  labels: `[N]` of each, where the method may see them.  held_out: others, to stop by.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def sizes(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[Tensor] | None: ...
    @property
    def held_out(self) -> Data | None: ...
    @property
    def real(self) -> Tensor | None:
        """Which positions `[n, T]` of what the model reads just now are no padding; None: all."""
        ...

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        """Logits `[len(rows[t]), C]` of some inputs of each task, C the same for all of a task.

        rows: one tensor of indices a task, which may be empty.  view: 0, the inputs as they are;
        above, a random variation of them that depends on this number and the input alone.
        """
        ...


def logits_of(data: Data, task: int, rows: Tensor) -> Tensor:
    """Logits `[len(rows), C]` of some inputs of one task alone."""
    none = torch.empty(0, dtype=torch.long)
    return data.logits([rows if t == task else none for t in range(len(data.tasks))])[task]


@dataclass(frozen=True)
class Learner:
    """What a learned merge is given besides task vectors.

    stored: coefficients found before; then nothing is learned, and data may be missing.
    minimise: a black-box optimiser, `(loss, start, bound, evaluations, seed) -> best point`.
    load, save: a place for the state of an interrupted run.
    """

    data: Data | None = None
    stored: Coefficients | None = None
    minimise: Callable[..., Sequence[float]] | None = None
    load: Callable[[], State | None] = lambda: None
    save: Callable[[State], None] = lambda state: None
    report: Callable[[str, int, int], None] = lambda what, done, of: None

    @property
    def given(self) -> Data:
        if self.data is None:
            raise ValueError("expected data to learn from, found none")
        return self.data
