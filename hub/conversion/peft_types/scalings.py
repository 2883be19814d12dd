"""Adapters that multiply entries of the base's weights: IA3 and HiRA."""

from __future__ import annotations

from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.merge import Dense
from torch import Tensor


def _ia3(module: AdaptedModule) -> Dense:
    """Return `(l - 1) W`: a vector `[1, I]` scales the inputs, and `[O, 1]` the outputs."""
    return Dense((module.tensors["ia3_l"] - 1) * module.base.weight(module.path))


def _ia3_bias(module: AdaptedModule) -> Tensor | None:
    """Return the change of the bias, which a vector of the outputs scales, too."""
    scales, bias = module.tensors["ia3_l"], module.base.bias(module.path)
    return None if bias is None or scales.shape[1] != 1 else (scales.flatten() - 1) * bias


register(
    AdapterType(
        "IA3",
        ("ia3_l",),
        _ia3,
        frozenset({"feedforward_modules", "init_ia3_weights"}),
        needs_base=True,
        bias=_ia3_bias,
    )
)


def _hira(module: AdaptedModule) -> Dense:
    """Return the product of each entry of W with that of `B A`."""
    return Dense(
        (module.tensors["hira_B"] @ module.tensors["hira_A"]) * module.base.weight(module.path)
    )


register(
    AdapterType(
        "HIRA",
        ("hira_A", "hira_B"),
        _hira,
        frozenset({"r", "rank_pattern", "hira_dropout"}),
        needs_base=True,
    )
)
