"""A frozen linear module with routed experts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from experthub.merge import Combine
from experthub.routing._context import Context
from experthub.routing._group import Group, Kernel, alike
from experthub.routing._router import ExpertStack, Router
from torch import Tensor, nn


class RoutedLinear(nn.Module):
    """`y = W x` plus the experts' changes, weighted by a router for every token.

    base: the frozen linear module; its parameters keep their names here, so that the model's
    state dict is the base's.  combine: `outputs` mixes `B_e A_e x`, `parameters` mixes the A and
    the B first, which needs experts of one rank.  train_probes: the router's probes become the
    only trainable parameter, `probes_PI`.
    """

    def __init__(
        self,
        base: nn.Module,
        stack: ExpertStack,
        router: Router,
        combine: Combine = "outputs",
        *,
        kernel: Kernel | None = None,
        train_probes: bool = False,
        place: tuple[Group, int] | None = None,
    ) -> None:
        """place: a group that the module belongs to, and its number there; None makes one."""
        super().__init__()
        weight = cast(Tensor, base.weight)
        self._base = (base,)  # in a tuple: the module's parameters are registered once, below
        self.register_parameter("weight", cast(nn.Parameter, weight))
        self.register_parameter("bias", cast("nn.Parameter | None", getattr(base, "bias", None)))
        self.experts = stack.experts
        probes = router.probes_PI
        self.probes_PI = (
            nn.Parameter(probes.to(weight.device, torch.float32))
            if train_probes and probes is not None
            else None
        )
        if place is None:
            own = Group([stack], [router], weight, combine, kernel=kernel, trained=self.probes_PI)
            place = own, 0
        self.group, self.number = place

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
    stacks: Sequence[ExpertStack],
    routers: Sequence[Router],
    combine: Combine = "outputs",
    kernel: Kernel | None = None,
    context: Context | None = None,
) -> list[RoutedLinear]:
    """Modules that read one input, as one group where their experts and routers allow it.

    context: of the model that they are parts of.
    """
    weight = cast(Tensor, bases[0].weight)
    together = (
        len({stack.experts for stack in stacks}) == 1
        and len({stack.width for stack in stacks}) == 1
        and alike(routers)
        and (combine == "outputs" or all(stack.equal_ranks for stack in stacks))
    )
    members = list(zip(bases, stacks, routers, strict=True))
    if not together:
        groups = [
            Group([s], [r], cast(Tensor, b.weight), combine, kernel=kernel, context=context)
            for b, s, r in members
        ]
        pairs = zip(members, groups, strict=True)
        return [RoutedLinear(b, s, r, combine, place=(g, 0)) for (b, s, r), g in pairs]
    group = Group(stacks, routers, weight, combine, kernel=kernel, context=context)
    return [RoutedLinear(b, s, r, combine, place=(group, i)) for i, (b, s, r) in enumerate(members)]
