"""Inventories of skills: S LoRAs for one linear module, which every task mixes in its own way.

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

GATE_EPS = 1e-12
AVERAGE = "average"  # The name of the mixture in which every skill has the same weight.
# The way of training an inventory -> the method that serves it.
SERVED_BY = {"poly": "poly", "mhr": "mhr", "shared": "poly", "private": "poly"}
MULTI_HEADED = frozenset({"mhr"})  # The ways of training with more than one head.


@dataclass(frozen=True, eq=False)
class Skills:
    """The skills of one module, and the weights with which each task mixes them.

    Args:
        a_SRI: The skills' factors A `[S, R, I]`.
        b_SOR: The skills' factors B `[S, O, R]`.
        scale: `alpha / R`.
        logits: Task -> logits `[H, S]`. Head h mixes the h-th contiguous slice of the inputs of A and
            of the outputs of B.

    Raises:
        ValueError: The shapes do not match, or the heads do not divide the inputs and the outputs.
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
        """Compute the weights of the skills for a task.

        Args:
            task: The name of a task, or `average`, for which every weight is 1 / S.

        Returns:
            Weights `[H, S]`; those of a head sum to 1.

        Raises:
            KeyError: The inventory was not trained on the task.
        """
        if task == AVERAGE:
            n_heads = len(next(iter(self.logits.values())))
            return torch.full((n_heads, len(self.a_SRI)), 1 / len(self.a_SRI))
        return normalise_gates(torch.sigmoid(self.logits[task].float()))

    def fold(self, task: str | None) -> LowRank:
        """Compute the mixture for a task as one plain LoRA.

        Args:
            task: The name of a task, or `average`; None means `average`.

        Returns:
            The LoRA, of rank R.

        Raises:
            KeyError: The inventory was not trained on the task.
        """
        weights_UHS = self.weights(task or AVERAGE)[None].to(self.a_SRI)
        a_URI, b_UOR = mix_skills(self.a_SRI, self.b_SOR, weights_UHS)
        return LowRank(a_URI[0], b_UOR[0], self.scale)


def check_heads(n_heads: int, inputs: int, outputs: int) -> None:
    """Refuse a number of heads that does not divide a module's inputs and outputs.

    Args:
        n_heads: The number of heads H.
        inputs: The number of inputs I of the module.
        outputs: The number of outputs O of the module.

    Raises:
        ValueError: H is below 1, or does not divide I and O.
    """
    if n_heads < 1 or inputs % n_heads or outputs % n_heads:
        raise ValueError(
            f"expected heads that divide {inputs} inputs and {outputs} outputs, found {n_heads}"
        )


def normalise_gates(gates: Tensor) -> Tensor:
    """Divide gates by their sum (Ponti et al., section 2.2).

    Args:
        gates: Gates `[..., S]` in (0, 1).

    Returns:
        Weights `[..., S]` that sum to 1.
    """
    return gates / (gates.sum(-1, keepdim=True) + GATE_EPS)


def mix_skills(a_SRI: Tensor, b_SOR: Tensor, w_UHS: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the factors of the skills for each task, head by head.

    Args:
        a_SRI: The skills' factors A `[S, R, I]`.
        b_SOR: The skills' factors B `[S, O, R]`.
        w_UHS: The weights `[U, H, S]` of U tasks.

    Returns:
        The factors A `[U, R, I]` and B `[U, O, R]` of each task.
    """
    n_heads = w_UHS.shape[1]
    a_SRHi = a_SRI.unflatten(2, (n_heads, -1))  # type: ignore[no-untyped-call]
    b_SHoR = b_SOR.unflatten(1, (n_heads, -1))  # type: ignore[no-untyped-call]
    a_URI = torch.einsum("uhs,srhi->urhi", w_UHS, a_SRHi).flatten(2)
    return a_URI, torch.einsum("uhs,shor->uhor", w_UHS, b_SHoR).flatten(1, 2)
