"""Layer-norm tuning: the adapter has the trained norms themselves."""

from __future__ import annotations

from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.merge import Dense
from torch import Tensor


def _norm(module: AdaptedModule) -> Dense:
    """Return the trained weight minus the base's."""
    before = module.base.parameter(f"{module.path}.weight")
    return Dense(module.tensors["ln_tuning_layers.weight"] - before)


def _norm_bias(module: AdaptedModule) -> Tensor | None:
    """Return the trained bias minus the base's."""
    after = module.tensors.get("ln_tuning_layers.bias")
    return None if after is None else after - module.base.parameter(f"{module.path}.bias")


register(
    AdapterType(
        "LN_TUNING",
        ("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
        _norm,
        needs_base=True,
        bias=_norm_bias,
    )
)
