"""LoKr: the change is a Kronecker product."""

from __future__ import annotations

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.merge import LowRank
from torch import Tensor


def _factor(module: AdaptedModule, name: str) -> tuple[Tensor, Tensor]:
    """Return a factor of the product as `left @ right`, through its shorter side."""
    whole = module.tensors.get(name)
    if whole is None:
        return module.tensors[f"{name}_a"], module.tensors[f"{name}_b"]
    rows, columns = whole.shape
    if rows <= columns:
        return torch.eye(rows, dtype=whole.dtype), whole
    return whole, torch.eye(columns, dtype=whole.dtype)


def _lokr(module: AdaptedModule) -> LowRank:
    """Return `kron(W1, W2)`: with `W = L R` for both, it is `kron(L1, L2) kron(R1, R2)`."""
    (left_1, right_1), (left_2, right_2) = (_factor(module, f"lokr_w{i}") for i in (1, 2))
    scale = module.setting("alpha", 8, "alpha_pattern") / module.setting("r", 8, "rank_pattern")
    return LowRank(torch.kron(right_1, right_2), torch.kron(left_1, left_2), scale)


register(
    AdapterType(
        "LOKR",
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        _lokr,
        frozenset(
            [
                "r",
                "alpha",
                "rank_pattern",
                "alpha_pattern",
                "rank_dropout",
                "module_dropout",
                "rank_dropout_scale",
                "use_effective_conv2d",
                "decompose_both",
                "decompose_factor",
            ]
        ),
        low_rank=True,
    )
)
