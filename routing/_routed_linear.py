"""A frozen linear module with routed experts beside it."""

from __future__ import annotations

from typing import Literal, cast

import torch
from experthub.routing._kernels import mix_outputs, mix_parameters, read, scored
from experthub.routing._router import ExpertStack, Router
from torch import Tensor, nn

Combine = Literal["outputs", "parameters"]


class RoutedLinear(nn.Module):
    """`y = W x` plus the experts' changes, weighted by a router for every token.

    base: the frozen linear module; its parameters keep their names here, so that the model's
    state dict is the base's.  combine: `outputs` mixes `B_e A_e x`, `parameters` mixes the A and
    the B first, which needs experts of one rank.  train_probes: the router's probes become the
    only trainable parameter, `probes_PI`.
    """

    a_RI: Tensor
    b_RO: Tensor
    owner_R: Tensor
    probes_PI: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        stack: ExpertStack,
        router: Router,
        combine: Combine = "outputs",
        train_probes: bool = False,
    ) -> None:
        super().__init__()
        if combine == "parameters" and not stack.equal_ranks:
            raise ValueError("combine: parameters expects experts of one rank")
        weight = cast(Tensor, base.weight)
        probes = router.probes_PI
        # One product reads x for A and the probes; in a narrower dtype the scores need their own.
        self.fused = probes is not None and weight.dtype == torch.float32 and not train_probes
        self._base = (base,)  # in a tuple: the module's parameters are registered once, below
        self.register_parameter("weight", cast(nn.Parameter, weight))
        self.register_parameter("bias", cast("nn.Parameter | None", getattr(base, "bias", None)))
        rows = stack.rows(router.probes_PI if self.fused else None)
        self.n_ranks = len(stack.owner_R)
        self.register_buffer("rows", rows.to(weight.device, weight.dtype), persistent=False)
        self.register_buffer("b_RO", stack.b_RO.to(weight.device, weight.dtype), persistent=False)
        self.register_buffer("owner_R", stack.owner_R.to(weight.device), persistent=False)
        if train_probes and probes is not None:
            self.probes_PI = nn.Parameter(probes.to(weight.device, torch.float32))
        else:
            kept = None if probes is None or self.fused else probes.to(weight.device, torch.float32)
            self.register_buffer("probes_PI", kept, persistent=False)
        self.experts = stack.experts
        self.router = router
        self.mix = mix_outputs if combine == "outputs" else mix_parameters

    @property
    def base(self) -> nn.Module:
        """The original module."""
        return self._base[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., I]`.  Returns `[..., O]` in the base's dtype."""
        y: Tensor = self.base(x)
        x_TI = x.reshape(-1, x.shape[-1])
        rows = cast(Tensor, self.rows)
        if self.fused:
            z_TR, scores_TP = read(x_TI, rows, self.n_ranks)
        else:
            z_TR = x_TI @ rows.T
            scores_TP = scored(x_TI, self.probes_PI)
        w = self.router.weights(x_TI, scores_TP)
        y_TO = self.mix(y.reshape(-1, y.shape[-1]), z_TR, w, self.owner_R, self.b_RO)
        return y_TO.view(y.shape)

    def routing(self, x: Tensor) -> Tensor:
        """The weights `[..., E]` that the router gives to inputs `[..., I]`."""
        x_TI = x.reshape(-1, x.shape[-1])
        probes = self.probes_PI
        if self.fused:
            probes = cast(Tensor, self.rows)[self.n_ranks :]
        w = self.router.weights(x_TI, scored(x_TI, probes)).expand(len(x_TI), len(self.experts))
        return w.view(*x.shape[:-1], -1)
