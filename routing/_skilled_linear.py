"""A frozen linear module with trainable skills beside it.

Shapes as in `_skills.py`; B rows of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from experthub.routing._skills import check_heads, mixed, normalised
from torch import Tensor, nn


@dataclass(eq=False)
class BatchTasks:
    """The task of each row of the batch that a model reads, shared by all of its skilled modules.

    Attributes:
        tasks: Indices of tasks `[B]`; None before the first batch.
    """

    tasks: Tensor | None = None


class SkilledLinear(nn.Module):
    """A linear module `y = W x` plus a LoRA, which is mixed out of S skills for the row's task."""

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
            a_SRI: The skills' A.
            b_SOR: The skills' B.
            scale: alpha / R.
            logits: `[U, H, S]`: for each of U tasks and H heads a logit of each skill; the module's
                own, or shared with others.
            batch: The tasks of the batch.
            relaxed: Draw the gates in training from relaxed Bernoulli distributions of temperature 1
                (Ponti et al., section 2.2), once for each task of a batch, where the authors draw
                for each row.  Otherwise, and in evaluation, they are the sigmoid of the logits.

        Raises:
            ValueError: The heads do not divide the inputs and the outputs.
        """
        super().__init__()
        check_heads(logits.shape[1], a_SRI.shape[2], b_SOR.shape[1])
        self.base, self.scale, self.batch, self.relaxed = base, scale, batch, relaxed
        self.skill_a, self.skill_b = nn.Parameter(a_SRI), nn.Parameter(b_SOR)
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs of the base and of each row's mixture of skills.

        Args:
            x: Inputs `[B, ..., I]`.

        Returns:
            `[B, ..., O]`.

        Raises:
            ValueError: The batch does not have the tasks of B rows.
        """
        y, tasks = self.base(x), self.batch.tasks
        if tasks is None or len(tasks) != len(x):
            raise ValueError(f"expected the tasks of {len(x)} rows, found {tasks}")
        known, row_B = torch.unique(tasks, return_inverse=True)
        a_URI, b_UOR = mixed(self.skill_a, self.skill_b, self._weights(known))
        x_BTI = x.reshape(len(x), -1, x.shape[-1])
        if len(known) == 1:
            z_BTR = x_BTI @ a_URI[0].T
            out = z_BTR @ b_UOR[0].T
        else:
            # All tasks' A in one product, and each row's own kept: cheaper than a product per row.
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
            return normalised(torch.sigmoid(logits_UHS))
        bernoulli: Any = torch.distributions.RelaxedBernoulli
        drawn = bernoulli(torch.ones(()), logits=logits_UHS).rsample()
        return normalised(cast(Tensor, drawn))
