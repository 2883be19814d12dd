"""What a router is, and what it routes over.

Shapes: T tokens (any leading dimensions), E experts that adapt the module, R the sum of their
ranks, I inputs and O outputs of the module, P probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from experthub.merge import LowRank
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """All experts of one linear module, stacked once and never again.

    deltas: the experts' changes, by their place in the recipe and in its order; one that does not
    adapt the module is not among them.  n_experts: how many the recipe has.  gates_EI: the gates
    that the experts ship with, or None.
    """

    deltas: Mapping[int, LowRank]
    n_experts: int
    gates_EI: Tensor | None = None

    @classmethod
    def of(
        cls,
        deltas: Mapping[int, LowRank],
        n_experts: int,
        gates: Mapping[int, Tensor] | None = None,
    ) -> ExpertStack:
        """Stack the changes of one module, keyed by the experts' place in the recipe.

        Raises ValueError for no experts, or for changes or gates that do not fit one module.
        """
        experts = sorted(deltas)
        if not experts or experts[-1] >= n_experts:
            raise ValueError(f"expected experts among 0..{n_experts - 1}, found {experts}")
        shapes = {delta.shape for delta in deltas.values()}
        if len(shapes) > 1:
            raise ValueError(f"expected changes of one module, found shapes {sorted(shapes)}")
        stacked = None if gates is None else torch.stack([gates[e].float() for e in experts])
        width = shapes.pop()[1]
        if stacked is not None and tuple(stacked.shape) != (len(experts), width):
            raise ValueError(f"expected gates [{len(experts)}, {width}], found {stacked.shape}")
        return cls({e: deltas[e] for e in experts}, n_experts, stacked)

    @property
    def experts(self) -> tuple[int, ...]:
        """Which of the recipe's experts adapt the module."""
        return tuple(self.deltas)

    @property
    def width(self) -> int:
        """I, the module's inputs."""
        return next(iter(self.deltas.values())).shape[1]

    @cached_property
    def a_RI(self) -> Tensor:
        """The experts' A, one below the other."""
        return self.rows(None)

    def rows(self, probes_PI: Tensor | None) -> Tensor:
        """The experts' A above the probes, `[R + P, I]`, for one product with x."""
        below = [] if probes_PI is None else [probes_PI]
        return torch.cat([*(delta.a for delta in self.deltas.values()), *below])

    @cached_property
    def b_RO(self) -> Tensor:
        """The experts' B transposed, with scale and recipe weight folded in."""
        b_RO = torch.cat([delta.b.T for delta in self.deltas.values()])
        scales = [delta.scale for delta in self.deltas.values() for _ in range(delta.rank)]
        return b_RO.mul_(torch.tensor(scales, dtype=b_RO.dtype, device=b_RO.device)[:, None])

    @cached_property
    def owner_R(self) -> Tensor:
        """For every row of A and B its expert: a place in `experts`."""
        ranks = [delta.rank for delta in self.deltas.values()]
        return torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))

    @property
    def equal_ranks(self) -> bool:
        return len({delta.rank for delta in self.deltas.values()}) == 1


class Router(Protocol):
    """Inputs -> weights over the experts of one module.

    probes_PI: linear functionals of the input, float32, which the kernel computes together with
    A x; None for a router that does not look at the input.
    """

    @property
    def probes_PI(self) -> Tensor | None: ...

    def weights(self, x_TI: Tensor, scores_TP: Tensor) -> Tensor:
        """Weights `[..., E]`, float32 and finite; a row's weights depend on that row only.

        scores_TP: `x @ probes.T` in float32, `[T, 0]` without probes.
        """
        ...


def standardised(rows_EI: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row with mean 0 and variance 1: LayerNorm without affine parameters.

    A constant row becomes zeros, not NaN.  The mean is taken off in float64, so that it is zero
    after rounding too, as `scores` of uncentred inputs need it.
    """
    wide = rows_EI.double()
    wide = wide - wide.mean(-1, keepdim=True)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).float()


def top_k_softmax(scores_TE: Tensor, k: int) -> Tensor:
    """Softmax over the k largest scores of each row, zero elsewhere.

    Equals the softmax over all, cut to its k largest and renormalised.  k above E means E.
    """
    if k >= scores_TE.shape[-1]:
        return scores_TE.softmax(-1)
    top_Tk, index_Tk = scores_TE.topk(k, dim=-1)
    return torch.zeros_like(scores_TE).scatter(-1, index_Tk, top_Tk.softmax(-1))
