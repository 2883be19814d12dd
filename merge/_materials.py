"""The materials from which a merge prepares its state: data, and the model that reads it.

Shapes: N inputs of a task, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from experthub.merge._catalogue import MethodError
from experthub.merge._task_vector import TaskVector
from torch import Tensor, nn

Progress = Mapping[str, Tensor]  # The progress of an interrupted run: tensors by name.


class Minimizer(Protocol):
    """A black-box optimiser."""

    def __call__(
        self,
        loss: Callable[[Sequence[float]], float],
        start: Sequence[float],
        bound: float,
        evaluations: int,
        seed: int,
    ) -> Sequence[float]:
        """Search for the point of least loss.

        Args:
            loss: The function to minimise.
            start: The first point.
            bound: The largest absolute value of a coordinate.
            evaluations: The largest number of evaluations of the loss, at least 1.
            seed: The seed of the search.

        Returns:
            The best point that was evaluated.
        """
        ...


class Data(Protocol):
    """Inputs of one or more tasks, and the model that reads them."""

    @property
    def model(self) -> nn.Module:
        """The model; a merge may set its weights while it learns."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """The names of the tasks."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """The number of inputs of each task."""
        ...

    @property
    def labels(self) -> Sequence[Tensor] | None:
        """The right choices `[N]` of each task; None if the method may not see them."""
        ...

    @property
    def held_out(self) -> Data | None:
        """Other inputs, on which early stopping is decided."""
        ...

    @property
    def real(self) -> Tensor | None:
        """A mask `[n, T]` of the current batch that is false for padding; None means no padding."""
        ...

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        """Compute the logits of some inputs of each task.

        Args:
            rows: One tensor of input numbers per task; it may be empty.
            view: 0 reads the inputs as they are. Another number reads a random variation of them,
                which depends on this number and on the input alone.

        Returns:
            Logits `[len(rows[t]), C]` per task `t`; C is the same for all inputs of a task.
        """
        ...


def compute_logits(data: Data, task: int, rows: Tensor) -> Tensor:
    """Compute the logits of some inputs of one task alone.

    Args:
        data: Inputs and the model.
        task: The position of the task.
        rows: Numbers of inputs `[n]`.

    Returns:
        Logits `[n, C]`.
    """
    none = torch.empty(0, dtype=torch.long)
    return data.logits([rows if t == task else none for t in range(len(data.tasks))])[task]


def _load_nothing() -> Progress | None:
    """Return None, because no run was interrupted."""
    return None


def _save_nothing(progress: Progress) -> None:
    """Ignore the progress of a run."""


def _report_nothing(what: str, done: int, size: int) -> None:
    """Ignore a progress report."""


@dataclass(frozen=True)
class MergeMaterials:
    """The materials that a merge can use when it prepares its state.

    Args:
        vectors: The task vectors of the experts, in the recipe's order.
        weights: The experts' weights `[E]`.
        data: The data of the recipe, and the base that reads it.
        minimize: A black-box optimiser.
        load: A function that returns the progress of an interrupted run; None if there was none.
        save: A function that stores the progress of a run, from which the next run continues.
        report: A progress callback, called with a description, the amount done and the total amount.
    """

    vectors: Sequence[TaskVector]
    weights: Tensor
    data: Data | None = None
    minimize: Minimizer | None = None
    load: Callable[[], Progress | None] = _load_nothing
    save: Callable[[Progress], None] = _save_nothing
    report: Callable[[str, int, int], None] = _report_nothing

    @property
    def given_data(self) -> Data:
        """The data; a ValueError is raised if there is none."""
        if self.data is None:
            raise MethodError(
                "expected data to learn from, found none",
                'register the merge with needs=("data",)',
            )
        return self.data

    @property
    def paired_data(self) -> Data:
        """The data, checked to have one task for each expert; a ValueError is raised otherwise."""
        data = self.given_data
        if len(data.tasks) != len(self.vectors):
            raise ValueError(
                f"expected one task for each of the {len(self.vectors)} experts, in their order, "
                f"found {len(data.tasks)}"
            )
        return data
