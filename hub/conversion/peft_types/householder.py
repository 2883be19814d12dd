"""HRA: the inputs of a module are reflected a few times."""

from __future__ import annotations

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.merge import LowRank


def _hra(module: AdaptedModule) -> LowRank:
    """Return `W (H - I)`, of the rank of the reflections: `H - I = U V^T`.

    Each reflection maps `[U, V]` to one more column: `(I + U V^T)(I - 2 u u^T) - I`.
    """
    vectors = module.tensors["hra_u"]
    if module.setting("apply_GS", False):
        q = torch.zeros_like(vectors)
        for i in range(vectors.shape[1]):
            u = vectors[:, i].clone()
            for j in range(i):
                u = u - (q[:, j] @ u) * q[:, j]
            q[:, i] = u / u.norm()
        left, right = -2 * q, q
    else:
        units = vectors / vectors.norm(dim=0)
        left = right = units[:, :0]
        for i in range(units.shape[1]):
            u = units[:, i : i + 1]
            left = torch.cat([left, -2 * (u + left @ (right.T @ u))], 1)
            right = torch.cat([right, u], 1)
    weight = module.base.weight(module.path)
    return LowRank(right.T.contiguous(), weight @ left)


register(
    AdapterType(
        "HRA",
        ("hra_u",),
        _hra,
        frozenset({"r", "apply_GS"}),
        low_rank=True,
        needs_base=True,
    )
)
