"""A frozen linear module with routed experts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from experthub.merge import Combine, make_like
from experthub.routing._context import Context
from experthub.routing._group import Group
from experthub.routing._packed import PackedExperts, pack_experts
from experthub.routing._router import ExpertStack, Router
from experthub.routing.kernels.names import Kernel
from torch import Tensor, nn


class RoutedLinear(nn.Module):
    """A linear module `y = W x` plus the changes of experts, which a router weighs for every token.

    The base's parameters keep their names, so that a model's state dict is that of its base.

    Attributes:
        group: The experts of the module, and of others that share its input.
        position: The module's position in the group.
        probes_PI: The router's probes if they are trained, the only trainable parameter; else None.
    """

    def __init__(self, base: nn.Module, group: Group, position: int = 0) -> None:
        """Put the experts beside a module.

        Args:
            base: The frozen linear module.
            group: The experts of the module, and of others that share its input.
            position: The module's position in the group.
        """
        super().__init__()
        self._base = (base,)  # in a tuple: the module's parameters are registered once, below
        self.register_parameter("weight", cast(nn.Parameter, base.weight))
        self.register_parameter("bias", cast("nn.Parameter | None", getattr(base, "bias", None)))
        self.probes_PI = group.trained
        self.group, self.position = group, position

    @classmethod
    def from_stack(
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
        """Put experts beside a module that shares its input with no other.

        Args:
            base: The frozen linear module.
            stack: Its experts.
            router: The router over them.
            combine: `outputs` mixes `B_e A_e x`; `parameters` mixes the A and the B first.
            kernel: The kernel for all inputs; None chooses by the number of tokens.
            train_probes: Whether the router's probes become a trainable parameter.
            context: The rows of the current batch, and decisions about whole rows.

        Returns:
            The routed module.

        Raises:
            ValueError: `combine` is `parameters` and ranks differ.
        """
        weight, probes = cast(Tensor, base.weight), router.probes_PI
        trained = None
        if train_probes and probes is not None:
            trained = nn.Parameter(probes.to(weight.device, torch.float32))
        packed = pack_experts([stack], [router], weight, fuse=trained is None)
        group = Group(
            packed, weight.dtype, combine, kernel=kernel, trained=trained, context=context
        )
        return cls(base, group)

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that adapt the module, by their position in the recipe."""
        return self.group.packed.experts

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            if name in self.base._parameters:  # Torch may have replaced it instead of changing it.
                self.base._parameters[name] = parameter
        if self.position == 0:
            self.group.apply(fn)
        return self

    @property
    def base(self) -> nn.Module:
        """The original module."""
        return self._base[0]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the outputs of the base and of the experts.

        Args:
            x: Inputs `[..., I]`.
            y: The outputs of the base `[..., O]`, which are changed; None computes them.

        Returns:
            `[..., O]` in the base's dtype.
        """
        return self.group.add_to(self._base[0](x) if y is None else y, x, self.position)

    def compute_weights(self, x: Tensor) -> Tensor:
        """Compute the weights that the router gives to the experts.

        Args:
            x: Inputs `[..., I]`.

        Returns:
            `[..., E]`.
        """
        return self.group.compute_weights(x, self.position)


def attach_experts(
    bases: Sequence[nn.Module],
    packed: PackedExperts,
    combine: Combine = "outputs",
    kernel: Kernel | None = None,
    context: Context | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[RoutedLinear]:
    """Put packed experts beside the modules of one group.

    Args:
        bases: The frozen linear modules, which share an input.
        packed: Their experts.
        combine: `outputs` mixes `B_e A_e x`; `parameters` mixes the A and the B first.
        kernel: The kernel for all inputs; None chooses by the number of tokens.
        context: The rows of the current batch, and decisions about whole rows.
        dtype: The dtype of the model, for modules whose weights are quantised.

    Returns:
        The routed modules, in the order of the bases.

    Raises:
        ValueError: `combine` is `parameters` and ranks differ.
    """
    like = make_like(bases[0], dtype)
    if packed.first_G1.device != like.device:
        packed = packed.map(lambda tensor: tensor.to(like.device))
    group = Group(packed, like.dtype, combine, kernel=kernel, context=context)
    return [RoutedLinear(base, group, position) for position, base in enumerate(bases)]
