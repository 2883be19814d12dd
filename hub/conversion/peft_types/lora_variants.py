"""LoRA with more than two factors, or with factors that began with a part of the base.

DoRA, biases of the factor B, and PiSSA, OLoRA and CorDA as they were saved.
"""

from __future__ import annotations

import math
from reprlib import repr as short

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.lora_config import HARMLESS, HONOURED, REFUSED, is_plain_init
from experthub.merge import Delta, Dense, LowRank
from torch import Tensor

HANDLED = {"use_dora", "lora_bias", "bias", "modules_to_save"}
TENSORS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)


def _scale(module: AdaptedModule, rank: int) -> float:
    """Return the factor of the change by PEFT's rules."""
    alpha = module.setting("lora_alpha", 8, "alpha_pattern")
    return float(alpha) / (math.sqrt(rank) if module.config.get("use_rslora") else rank)


def _factors(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A and B of a linear module or of an embedding."""
    if "lora_A.weight" in tensors:
        return tensors["lora_A.weight"], tensors["lora_B.weight"]
    return tensors["lora_embedding_A"], tensors["lora_embedding_B"]


def _low_rank(module: AdaptedModule) -> LowRank:
    """Return the change of the weight without the magnitudes of DoRA."""
    a, b = _factors(dict(module.tensors))
    scale = _scale(module, len(a))
    taken = _find_taken(module, len(a), scale)
    if taken is None:
        return LowRank(a, b, scale)
    # W + change = W - taken + scale B A.
    return LowRank(torch.cat([a, taken.a]), torch.cat([b * scale, -taken.b * taken.scale], 1))


def _find_taken(module: AdaptedModule, rank: int, scale: float) -> LowRank | None:
    """Return the part of the base's weight that the initialisation moved into the factors."""
    start = module.config.get("init_lora_weights")
    if is_plain_init(start) or "lora_embedding_A" in module.tensors:
        return None
    word = str(start).lower()
    if word == "loftq":
        raise IntegrityError(
            "init_lora_weights is 'loftq', which replaced the base by a quantised copy of it",
            "merge the adapter with peft, and store the difference with hub diff",
        )
    if module.initial is not None:
        a, b = _factors(dict(module.initial))
        return LowRank(a, b, scale)
    if word == "pissa":  # peft computes in float32, and does so again when it loads the adapter.
        u, s, vh = torch.linalg.svd(module.base.weight(module.path).float(), full_matrices=False)
        return LowRank(vh[:rank].double(), (u[:, :rank] * s[:rank]).double())
    if word == "olora" and not module.config.get("fan_in_fan_out"):
        q, r = torch.linalg.qr(module.base.weight(module.path).float())
        return LowRank(r[:rank].double(), q[:, :rank].double(), scale)
    raise IntegrityError(
        f"init_lora_weights is {short(start)}, which took a part of the base that only the adapter "
        "before its training tells",
        "run hub convert FOLDER OUT --initial FOLDER with the adapter as it was saved before the "
        "training, or merge the adapter with peft and store the difference with hub diff",
    )


def _dense(module: AdaptedModule) -> Delta:
    """Return the change of the weight, with DoRA's magnitude m: `m (W' + s B A) / norm - W`."""
    change = _low_rank(module)
    names = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
    magnitude = next((module.tensors[n] for n in names if n in module.tensors), None)
    if magnitude is None and module.config.get("use_dora"):
        raise IntegrityError(
            f"use_dora is True, and {module.path} has no magnitudes in the file",
            "check that the file is complete",
        )
    if magnitude is None:
        return Dense(change.dense())
    weight = module.base.weight(module.path)
    moved = weight + change.dense()
    # The norm of a row of a linear module; an embedding is transposed, and so are its norms.
    scaled = moved * (magnitude.flatten() / moved.norm(dim=1))[:, None]
    return Dense(scaled - weight)


def _bias(module: AdaptedModule) -> Tensor | None:
    """Return the change of the bias by the bias of B."""
    own = module.tensors.get("lora_B.bias")
    if own is None and module.config.get("lora_bias") and "lora_A.weight" in module.tensors:
        raise IntegrityError(
            f"lora_bias is True, and {module.path} has no bias in the file",
            "check that the file is complete",
        )
    if own is None:
        return None
    if module.base.bias(module.path) is None:
        raise IntegrityError(
            f"{module.path} has no bias in the base, and lora_bias adds one",
            "train the adapter again without lora_bias",
        )
    return own * _scale(module, len(_factors(dict(module.tensors))[0]))


def _register(name: str, dense: bool) -> None:
    """Register the type of those that are low-rank, or of those that may be dense."""
    register(
        AdapterType(
            name,
            TENSORS,
            _dense if dense else _low_rank,
            frozenset(HARMLESS | HONOURED | HANDLED | {"init_lora_weights"}),
            {
                key: (values, reason)
                for key, (values, reason, _) in REFUSED.items()
                if key not in HANDLED
            },
            low_rank=not dense,
            needs_base=dense,
            bias=_bias,
            ignored=("lora_velora_embed", "lora_monteclora_sampler"),
        )
    )


_register("LORA", dense=False)
_register("LORA_DENSE", dense=True)
