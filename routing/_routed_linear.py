"""A frozen linear module with routed experts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from experthub.merge import Combine
from experthub.routing._context import Context
from experthub.routing._group import Group, Kernel, alike
from experthub.routing._packed import Packed
from experthub.routing._router import ExpertStack, Router
from torch import Tensor, nn


class RoutedLinear(nn.Module):
    """`y = W x` plus the experts' changes, weighted by a router for every token.

    base: the frozen linear module; its parameters keep their names here, so that the model's
    state dict is the base's.  combine: `outputs` mixes `B_e A_e x`, `parameters` mixes the A and
    the B first, which needs experts of one rank.  train_probes: the router's probes become the
    only trainable parameter, `probes_PI`.
    """

    def __init__(self, base: nn.Module, group: Group, number: int = 0) -> None:
        """group: the experts of the module, and of others that share its input; number: its own there."""
        super().__init__()
        self._base = (base,)  # in a tuple: the module's parameters are registered once, below
        self.register_parameter("weight", cast(nn.Parameter, base.weight))
        self.register_parameter("bias", cast("nn.Parameter | None", getattr(base, "bias", None)))
        self.probes_PI = group.trained
        self.group, self.number = group, number

    @classmethod
    def alone(
        cls,
        base: nn.Module,
        stack: ExpertStack,
        router: Router,
        combine: Combine = "outputs",
        *,
        kernel: Kernel | None = None,
        train_probes: bool = False,
        context: Context | None = None,
    ) -> RoutedLinear:
        """A module that shares its input with no other."""
        weight, probes = cast(Tensor, base.weight), router.probes_PI
        trained = None
        if train_probes and probes is not None:
            trained = nn.Parameter(probes.to(weight.device, torch.float32))
        group = Group(
            Packed.of([stack], [router]),
            weight,
            combine,
            kernel=kernel,
            trained=trained,
            context=context,
        )
        return cls(base, group)

    @property
    def experts(self) -> tuple[int, ...]:
        """Which of the recipe's experts adapt the module."""
        return self.group.experts

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.number == 0:
            self.group.apply(fn)
        return self

    @property
    def base(self) -> nn.Module:
        """The original module."""
        return self._base[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., I]`.  Returns `[..., O]` in the base's dtype."""
        return self.group.add_to(self._base[0](x), x, self.number)

    def routing(self, x: Tensor) -> Tensor:
        """The weights `[..., E]` that the router gives to inputs `[..., I]`."""
        return self.group.weights(x, self.number)


def routed(
    bases: Sequence[nn.Module],
    packed: Packed,
    combine: Combine = "outputs",
    kernel: Kernel | None = None,
    context: Context | None = None,
) -> list[RoutedLinear]:
    """Modules that share an input, as one group; see `together`.

    context: of the model that they are parts of.
    """
    weight = cast(Tensor, bases[0].weight)
    group = Group(packed, weight, combine, kernel=kernel, context=context)
    return [RoutedLinear(base, group, number) for number, base in enumerate(bases)]


def together(
    stacks: Sequence[ExpertStack], routers: Sequence[Router], combine: Combine = "outputs"
) -> list[list[int]]:
    """Modules that share an input by their places: all as one group, or each alone.

    They are one where the same experts adapt them, their routers differ in nothing but probes, and
    their ranks allow to combine.
    """
    one = (
        len({stack.experts for stack in stacks}) == 1
        and len({stack.width for stack in stacks}) == 1
        and alike(routers)
        and (combine == "outputs" or all(stack.equal_ranks for stack in stacks))
    )
    return [list(range(len(stacks)))] if one else [[place] for place in range(len(stacks))]
