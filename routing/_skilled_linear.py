"""A frozen linear module with trainable skills beside it.

Shapes: S skills, R rank, I inputs and O outputs of the module, H heads, U tasks, B rows of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from experthub.routing._skills import check_heads, mix_skills, normalise_gates
from torch import Tensor, nn


@dataclass(eq=False)
class BatchTasks:
    """The task of each row of the current batch, shared by all modules of a model that have skills.

    Args:
        tasks: Indices of tasks `[B]`; None before the first batch.
    """

    tasks: Tensor | None = None


class SkilledLinear(nn.Module):
    """A linear module `y = W x` plus a LoRA that is mixed from S skills for the task of each row."""

    def __init__(
        self,
        base: nn.Module,
        a_SRI: Tensor,
        b_SOR: Tensor,
        scale: float,
        logits: nn.Parameter,
        batch: BatchTasks,
        *,
        relaxed: bool = False,
    ) -> None:
        """Put skills beside a module.

        Args:
            base: The frozen linear module.
            a_SRI: The skills' factors A `[S, R, I]`.
            b_SOR: The skills' factors B `[S, O, R]`.
            scale: `alpha / R`.
            logits: The logits `[U, H, S]` of the skills for U tasks and H heads. Modules may share
                them.
            batch: The tasks of the current batch.
            relaxed: Draw the gates in training from relaxed Bernoulli distributions of temperature 1
                (Ponti et al., section 2.2). They are drawn once for each task of a batch; the
                authors draw them for each row. Otherwise, and in evaluation, the gates are the
                sigmoid of the logits.

        Raises:
            ValueError: The heads do not divide the inputs and the outputs.
        """
        super().__init__()
        check_heads(logits.shape[1], a_SRI.shape[2], b_SOR.shape[1])
        self.base, self.scale, self.batch, self.relaxed = base, scale, batch, relaxed
        self.skill_a, self.skill_b = nn.Parameter(a_SRI), nn.Parameter(b_SOR)
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the base plus that of each row's mixture of skills.

        Args:
            x: Inputs `[B, ..., I]`.

        Returns:
            Outputs `[B, ..., O]`.

        Raises:
            ValueError: The batch does not name the tasks of B rows.
        """
        y, tasks = self.base(x), self.batch.tasks
        if tasks is None or len(tasks) != len(x):
            raise ValueError(f"expected the tasks of {len(x)} rows, found {tasks}")
        known, row_B = torch.unique(tasks, return_inverse=True)
        a_URI, b_UOR = mix_skills(self.skill_a, self.skill_b, self._weights(known))
        x_BTI = x.reshape(len(x), -1, x.shape[-1])
        if len(known) == 1:
            z_BTR = x_BTI @ a_URI[0].T
            out = z_BTR @ b_UOR[0].T
        else:
            # One product with the A of all tasks, masked to each row's own task, is cheaper than one
            # product per row.
            z_BTUR = (x_BTI @ a_URI.flatten(0, 1).T).view(*x_BTI.shape[:2], len(known), -1)
            own_BU = nn.functional.one_hot(row_B, len(known)).to(x.dtype)
            z_BTUR = z_BTUR * own_BU[:, None, :, None]
            out = z_BTUR.flatten(2) @ b_UOR.transpose(1, 2).flatten(0, 1)
        added: Tensor = y + self.scale * out.view(y.shape)
        return added

    def _weights(self, tasks: Tensor) -> Tensor:
        """Compute the weights `[U, H, S]` of the skills for some tasks."""
        logits_UHS = self.logits[tasks]
        if not (self.relaxed and self.training):
            return normalise_gates(torch.sigmoid(logits_UHS))
        bernoulli: Any = torch.distributions.RelaxedBernoulli
        drawn = bernoulli(torch.ones(()), logits=logits_UHS).rsample()
        return normalise_gates(cast(Tensor, drawn))
