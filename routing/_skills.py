"""Inventories of skills: S LoRAs for one linear module, of which every task has a mixture of its own.

Ponti et al., "Combining Modular Skills in Multitask Learning", https://arxiv.org/abs/2202.13914, and
Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization",
https://arxiv.org/abs/2211.03831.

Shapes: S skills, R rank, I inputs and O outputs of the module, H heads, U tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from experthub.merge import LowRank
from torch import Tensor

EPS = 1e-12
AVERAGE = "average"  # the name of the mixture in which every skill has the same weight
# How an inventory was trained -> the method that serves it.
SERVED_BY = {"poly": "poly", "mhr": "mhr", "shared": "poly", "private": "poly"}
MULTI_HEADED = frozenset({"mhr"})  # ways of training with more than one head


@dataclass(frozen=True, eq=False)
class Skills:
    """The skills of one module, and the tasks' mixtures of them.

    a_SRI, b_SOR: the factors.  scale: alpha / R.  logits: task -> `[H, S]`.  Head h mixes the h-th
    contiguous slice of A's inputs, and of B's outputs.  Raises ValueError for shapes that do not fit.
    """

    a_SRI: Tensor
    b_SOR: Tensor
    scale: float
    logits: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        (s, r, i), (t, o, q) = self.a_SRI.shape, self.b_SOR.shape
        if (s, r) != (t, q):
            raise ValueError(f"expected B [{s}, O, {r}], found {list(self.b_SOR.shape)}")
        for task, logits in self.logits.items():
            if logits.ndim != 2 or logits.shape[1] != s:
                raise ValueError(f"expected logits [H, {s}] of {task}, found {list(logits.shape)}")
            check_heads(len(logits), i, o)

    def weights(self, task: str) -> Tensor:
        """The weights `[H, S]` of a task, `average`: 1 / S; KeyError for an unknown one."""
        if task == AVERAGE:
            n_heads = len(next(iter(self.logits.values())))
            return torch.full((n_heads, len(self.a_SRI)), 1 / len(self.a_SRI))
        return normalised(torch.sigmoid(self.logits[task].float()))

    def fold(self, task: str) -> LowRank:
        """The plain LoRA that a task's mixture is."""
        a_URI, b_UOR = mixed(self.a_SRI, self.b_SOR, self.weights(task)[None].to(self.a_SRI))
        return LowRank(a_URI[0], b_UOR[0], self.scale)


def check_heads(n_heads: int, inputs: int, outputs: int) -> None:
    """Raise ValueError unless a module's inputs and outputs can be cut into as many slices."""
    if n_heads < 1 or inputs % n_heads or outputs % n_heads:
        raise ValueError(
            f"expected heads that divide {inputs} inputs and {outputs} outputs, found {n_heads}"
        )


def normalised(gates: Tensor) -> Tensor:
    """Gates `[..., S]` in (0, 1) divided by their sum (Ponti et al., section 2.2)."""
    return gates / (gates.sum(-1, keepdim=True) + EPS)


def mixed(a_SRI: Tensor, b_SOR: Tensor, w_UHS: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of each task: A `[U, R, I]` and B `[U, O, R]`, head by head."""
    n_heads = w_UHS.shape[1]
    a_SRHi = a_SRI.unflatten(2, (n_heads, -1))  # type: ignore[no-untyped-call]
    b_SHoR = b_SOR.unflatten(1, (n_heads, -1))  # type: ignore[no-untyped-call]
    a_URI = torch.einsum("uhs,srhi->urhi", w_UHS, a_SRHi).flatten(2)
    return a_URI, torch.einsum("uhs,shor->uhor", w_UHS, b_SHoR).flatten(1, 2)
