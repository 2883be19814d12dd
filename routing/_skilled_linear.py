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
class TaskRows:
    """Which task each row of the batch is of, for all skilled modules of a model; `[B]`."""

    tasks: Tensor | None = None


class SkilledLinear(nn.Module):
    """`y = W x` plus a LoRA that is mixed out of S skills by the weights of the row's task.

    base: the frozen module.  logits: `[tasks, H, S]`, its own or shared with others.  rows: says the
    tasks.  relaxed: in training, gates are drawn from relaxed Bernoulli distributions of temperature 1
    (Ponti et al., section 2.2), once for every task of a batch, where the authors draw for each row;
    otherwise, and in evaluation, they are the sigmoid.
    """

    def __init__(
        self,
        base: nn.Module,
        a_SRI: Tensor,
        b_SOR: Tensor,
        scale: float,
        logits: nn.Parameter,
        rows: TaskRows,
        *,
        relaxed: bool = False,
    ) -> None:
        super().__init__()
        check_heads(logits.shape[1], a_SRI.shape[2], b_SOR.shape[1])
        self.base, self.scale, self.rows, self.relaxed = base, scale, rows, relaxed
        self.skill_a, self.skill_b = nn.Parameter(a_SRI), nn.Parameter(b_SOR)
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        """x: `[B, ..., I]`.  Returns `[B, ..., O]`; ValueError where no tasks of B rows are said."""
        y, tasks = self.base(x), self.rows.tasks
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
        logits_UHS = self.logits[tasks]
        if not (self.relaxed and self.training):
            return normalised(torch.sigmoid(logits_UHS))
        bernoulli: Any = torch.distributions.RelaxedBernoulli
        drawn = bernoulli(torch.ones(()), logits=logits_UHS).rsample()
        return normalised(cast(Tensor, drawn))
