"""What a router is, and what it routes over.

Shapes: T tokens (any leading dimensions), E experts that adapt the module, R the sum of their
ranks, I inputs and O outputs of the module, P probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from experthub.merge import LowRank
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """All experts of one linear module, as its router sees them.

    Args:
        deltas: The experts' changes by their position in the recipe, in its order; an expert that
            does not adapt the module is not among them.
        n_experts: The number of experts of the recipe.
        gates_EI: The gates that the experts ship with, or None.
        module: The path of the module in the model.
        labels: The names of all experts of the recipe.
        state: The tensors that the router prepared.
    """

    deltas: Mapping[int, LowRank]
    n_experts: int
    gates_EI: Tensor | None = None
    module: str = ""
    labels: tuple[str, ...] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)

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
        return torch.cat([delta.a for delta in self.deltas.values()])

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


@dataclass(frozen=True, eq=False)
class Weights:
    """How much of each expert a row takes.

    values: float32 and finite: `[..., E]` of every expert, or `[..., k]` of those chosen; without
    leading dimensions where no input changes them.  experts: `[..., k]`, the places in
    `ExpertStack.experts` of those chosen, each once.
    """

    values: Tensor
    experts: Tensor | None = None

    def dense(self, n_experts: int) -> Tensor:
        """`[..., E]`, zero where an expert was not chosen."""
        if self.experts is None:
            return self.values
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_experts)
        return zeros.scatter(-1, self.experts, self.values)

    def of_modules(self) -> Weights:
        """The same weights `[B, k]` for every module of a group, `[B, 1, k]`."""
        experts = self.experts
        return Weights(self.values.unsqueeze(1), None if experts is None else experts.unsqueeze(1))

    def repeated(self, tokens: int) -> Weights:
        """Those of rows `[B, ...]` for every token, `[B tokens, ...]`."""
        if tokens == 1:
            return self
        values = self.values.repeat_interleave(tokens, 0)
        experts = self.experts
        return Weights(values, None if experts is None else experts.repeat_interleave(tokens, 0))


class Router(Protocol):
    """Inputs -> weights over the experts of one module.

    probes_PI: linear functionals of the input, float32; None for a router that does not look at it.
    layer_norm: whether they are of the standardised input, and then have mean zero each.  pooled:
    whether it decides once for a row of tokens, by the mean of their scores.
    A dataclass: routers of modules that share their input, and that differ in nothing but probes,
    are asked once for all of them.
    """

    @property
    def probes_PI(self) -> Tensor | None: ...

    @property
    def layer_norm(self) -> bool: ...

    @property
    def pooled(self) -> bool: ...

    def weights(self, scores: Tensor) -> Weights:
        """The weights of every input, which depend on that one only.

        scores: `[T, G, P]`, float32, the products of T inputs with the probes of G modules; of B rows
        for a router that is `pooled`.
        """
        ...


@dataclass(frozen=True, eq=False)
class TopK:
    """The router of most token-wise methods: softmax over the top k scores of an input.

    absolute: of their sizes, whatever their signs.
    """

    probes_PI: Tensor
    top_k: int
    layer_norm: bool = False
    absolute: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        return top_k_softmax(self.ranked(scores), self.top_k)

    def ranked(self, scores: Tensor) -> Tensor:
        """What the top k are taken of."""
        return scores.abs() if self.absolute else scores


EPS = 1e-5  # of LayerNorm


def standardised(rows_EI: Tensor, eps: float = EPS) -> Tensor:
    """Each row with mean 0 and variance 1: LayerNorm without affine parameters.

    A constant row becomes zeros, not NaN.  The mean is taken off in float64, so that it is zero
    after rounding too, as `scores` of uncentred inputs need it.
    """
    wide = rows_EI.double()
    wide = wide - wide.mean(-1, keepdim=True)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).float()


def top_k_softmax(scores: Tensor, k: int) -> Weights:
    """Softmax over the k largest scores `[..., E]` of each row.

    Equals the softmax over all, cut to its k largest and renormalised.  k above E means E.
    """
    if k >= scores.shape[-1]:
        return Weights(scores.softmax(-1))
    values, experts = scores.topk(k, dim=-1)
    return Weights(values.softmax(-1), experts)
