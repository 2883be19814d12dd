"""The protocol of routers, the experts of a module that they route over, and their weights.

Shapes: T tokens, B rows, G modules that share their input, E experts that adapt the module, k chosen
experts, R the sum of the experts' ranks, I inputs and O outputs of the module, P probes.
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
    """The experts of one linear module, as its router sees them.

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
        """Stack the experts' changes of one module.

        Args:
            deltas: The changes by the experts' position in the recipe.
            n_experts: The number of experts of the recipe.
            gates: The gates `[I]` by the experts' position, or None.

        Returns:
            The stack, in the order of the recipe.

        Raises:
            ValueError: There is no expert, a position is not below `n_experts`, or the shapes of the
                changes and gates differ.

        Example:
            >>> delta = LowRank(torch.ones(1, 3), torch.ones(2, 1))
            >>> ExpertStack.of({0: delta, 1: delta}, n_experts=2).a_RI.shape
            torch.Size([2, 3])
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
            raise ValueError(
                f"expected gates [{len(experts)}, {width}], found {list(stacked.shape)}"
            )
        return cls({e: deltas[e] for e in experts}, n_experts, stacked)

    @property
    def experts(self) -> tuple[int, ...]:
        """The positions in the recipe of the experts that adapt the module."""
        return tuple(self.deltas)

    @property
    def width(self) -> int:
        """The number of inputs I of the module."""
        return next(iter(self.deltas.values())).shape[1]

    @cached_property
    def a_RI(self) -> Tensor:
        """The experts' factors A `[R, I]`, one below the other."""
        return torch.cat([delta.a for delta in self.deltas.values()])

    @cached_property
    def b_RO(self) -> Tensor:
        """The experts' factors B transposed `[R, O]`, multiplied by scale and recipe weight."""
        b_RO = torch.cat([delta.b.T for delta in self.deltas.values()])
        scales = [delta.scale for delta in self.deltas.values() for _ in range(delta.rank)]
        return b_RO.mul_(torch.tensor(scales, dtype=b_RO.dtype, device=b_RO.device)[:, None])

    @cached_property
    def owner_R(self) -> Tensor:
        """The expert of each row of `a_RI` and `b_RO`, as a position in `experts`."""
        ranks = [delta.rank for delta in self.deltas.values()]
        return torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))

    @property
    def equal_ranks(self) -> bool:
        """True if all experts have the same rank."""
        return len({delta.rank for delta in self.deltas.values()}) == 1


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of the experts for each row.

    Args:
        values: The weights, float32 and finite: `[..., E]` of all experts, or `[..., k]` of the
            chosen ones. There are no leading dimensions if the weights do not depend on the input.
        experts: The chosen experts `[..., k]` as positions in `ExpertStack.experts`, each at most
            once per row; None if `values` has all experts.
    """

    values: Tensor
    experts: Tensor | None = None

    def dense(self, n_experts: int) -> Tensor:
        """Return the weights of all experts.

        Args:
            n_experts: The number of experts E.

        Returns:
            Weights `[..., E]`; zero for an expert that was not chosen.
        """
        if self.experts is None:
            return self.values
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_experts)
        return zeros.scatter(-1, self.experts, self.values)

    def add_module_axis(self) -> Weights:
        """Add an axis for modules, so that all modules of a group use the same weights.

        Returns:
            Weights `[B, 1, k]`, from weights `[B, k]`.
        """
        experts = self.experts
        return Weights(self.values.unsqueeze(1), None if experts is None else experts.unsqueeze(1))

    def repeat_rows(self, tokens: int) -> Weights:
        """Repeat the weights of each row for all of its tokens.

        Args:
            tokens: The number of tokens S of a row.

        Returns:
            Weights `[B S, ...]`, from weights `[B, ...]`.
        """
        if tokens == 1:
            return self
        values = self.values.repeat_interleave(tokens, 0)
        experts = self.experts
        return Weights(values, None if experts is None else experts.repeat_interleave(tokens, 0))


class Router(Protocol):
    """A function from the inputs of a module to weights of its experts.

    A router is a dataclass. If modules share their input and their routers differ only in the probes,
    one of the routers is called once for all of these modules.
    """

    @property
    def probes_PI(self) -> Tensor | None:
        """Linear functionals of the input `[P, I]`, float32; None if the input is not looked at."""
        ...

    @property
    def layer_norm(self) -> bool:
        """True if the probes read the standardised input; every probe then has mean zero."""
        ...

    @property
    def pooled(self) -> bool:
        """True if the router decides once for a row of tokens, by the mean of their scores."""
        ...

    def weights(self, scores: Tensor) -> Weights:
        """Compute the weights of every input; they depend on the scores of that input alone.

        Args:
            scores: The products `[T, G, P]` of the inputs and the probes of G modules, float32. If
                the router is `pooled`, they are the means `[B, G, P]` over the tokens of each row.

        Returns:
            Weights with the leading dimensions of `scores`, or with none if all inputs have the same
            weights.
        """
        ...


@dataclass(frozen=True, eq=False)
class TopK:
    """A softmax over the k largest scores of an input, as most methods that route tokens use it.

    Args:
        probes_PI: The probes `[E, I]`, one per expert, float32.
        top_k: The number k of chosen experts.
        layer_norm: Whether the probes read the standardised input.
        absolute: Whether the absolute values of the scores count.
        pooled: Whether the router decides once for a row of tokens.
    """

    probes_PI: Tensor
    top_k: int
    layer_norm: bool = False
    absolute: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        """Compute the weights of the chosen experts for every input.

        Args:
            scores: The scores of all experts `[T, G, E]`, float32.

        Returns:
            Weights `[T, G, k]` of the chosen experts; `[T, G, E]` if k is not below E.
        """
        return top_k_softmax(self.rank_scores(scores), self.top_k)

    def rank_scores(self, scores: Tensor) -> Tensor:
        """Return the values whose k largest choose the experts.

        Args:
            scores: The scores of all experts `[..., E]`.

        Returns:
            The scores, or their absolute values if `absolute` is set.
        """
        return scores.abs() if self.absolute else scores


LAYER_NORM_EPS = 1e-5  # The epsilon of LayerNorm.


def standardise(rows_EI: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """Scale each row to mean 0 and variance 1: LayerNorm without affine parameters.

    The mean is subtracted in float64. It is then still zero after rounding to float32, which scores
    of inputs that are not centred rely on.

    Args:
        rows_EI: Rows `[..., I]`.
        eps: The constant that is added to the variance. It makes a constant row zero instead of NaN.

    Returns:
        The rows `[..., I]` in float32.
    """
    wide = rows_EI.double()
    wide = wide - wide.mean(-1, keepdim=True)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).float()


def top_k_softmax(scores: Tensor, k: int) -> Weights:
    """Compute the softmax over the k largest scores of each row.

    It equals the k largest values of the softmax over all scores, divided by their sum.

    Args:
        scores: Scores `[..., E]`.
        k: The number of chosen experts. From E on, all experts are chosen.

    Returns:
        Weights `[..., k]` with the chosen experts, or `[..., E]` if all are chosen.

    Example:
        >>> top_k_softmax(torch.tensor([[1.0, 3.0, 3.0]]), 2).values
        tensor([[0.5000, 0.5000]])
    """
    if k >= scores.shape[-1]:
        return Weights(scores.softmax(-1))
    values, experts = scores.topk(k, dim=-1)
    return Weights(values.softmax(-1), experts)
