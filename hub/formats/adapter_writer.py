"""Writing LoRA adapters in PEFT's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import write_json
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG
from experthub.hub.formats.dense_parts import FACTOR
from safetensors.torch import save_file
from torch import Tensor

LOSS = 2.0**-22  # Float32 rounds the factor, the scale and their product, each by up to 2**-24.


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    task_type: str | None,
    model_class: str = "",
    transposed: bool,
    pad: bool,
    dense: Mapping[str, Tensor] = MappingProxyType({}),
    keys: Mapping[str, Any] = MappingProxyType({}),
    parameters: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Write the two files of a LoRA whose alpha equals the rank, so that every scale is 1.

    Args:
        folder: An existing folder.
        tensors: The factors A `[R, I]` and B `[O, R]` of every module under PEFT's names. A stack of
            N matrices has `[N, R, I]` and `[N, O, R]`.
        base: The name of the base.
        task_type: PEFT's type of the task, such as `CAUSAL_LM`.
        model_class: The class of the model, which PEFT needs where there is no type of the task.
        transposed: Whether the modules store their weights as `[I, O]` (Conv1D).
        pad: Pad all factors with zeros to the largest rank. Otherwise modules with smaller ranks
            are listed in the configuration, which some programs cannot read.
        dense: The tensors of dense parts under PEFT's names.
        keys: The keys of the configuration that belong to the dense parts.
        parameters: The modules that are not linear, each with the names of its parameters that
            change. Its factors are under its path, with `.base_layer` for each outer parameter.
    """
    places = {name: _parse(name) for name in tensors}
    ranks = {module: tensors[name].shape[side] for name, (module, side) in places.items()}
    rank = max(ranks.values())
    smaller = {module: r for module, r in sorted(ranks.items()) if r != rank}
    # PEFT reads these names as regular expressions, in which a dot matches any character. No other
    # module matches by that.
    patterns = {} if pad else {"rank_pattern": smaller, "alpha_pattern": smaller}
    stored = {n: _pad(t, rank, places[n][1]) if pad else t for n, t in tensors.items()}
    flat = {n: _flatten(t, places[n][1]).contiguous() for n, t in stored.items()}
    flat |= {name: tensor.contiguous() for name, tensor in dense.items()}
    save_file(flat, folder / ADAPTER, metadata={"format": "pt"})
    modules = sorted(m for m in ranks if re.sub(r"(\.base_layer)+$", "", m) not in parameters)
    targeted = sorted(name for own in parameters.values() for name in own)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        **({} if task_type or not model_class else {"auto_mapping": _name_class(model_class)}),
        "r": rank,
        "lora_alpha": rank,
        **patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "fan_in_fan_out": transposed,
        "target_modules": modules,
        **({"target_parameters": targeted} if targeted else {}),
        "base_model_name_or_path": base,
        **keys,
    }
    write_json(folder / ADAPTER_CONFIG, settings)


def fold_exactly(b: Tensor, scale: float) -> Tensor | None:
    """Multiply the factor B of a LoRA by the scale without any rounding.

    Args:
        b: The factor.
        scale: The scale.

    Returns:
        The product in the dtype of the factor; None if the dtype cannot hold it exactly.
    """
    folded = b * scale
    return folded if torch.equal(folded.double(), b.double() * scale) else None


def fold_scale(b: Tensor, scale: float, module: str) -> Tensor:
    """Multiply the factor B of a LoRA by the scale in float32.

    Args:
        b: The factor.
        scale: The scale.
        module: The path of the module, for the error.

    Returns:
        The product in float32.

    Raises:
        HubError: Float32 cannot hold the product: it overflows, or its largest number would lose
            digits.
    """
    folded, exact = b.float() * scale, b.double() * scale
    lost, largest = (tensor.abs().amax() for tensor in (folded.double() - exact, exact))
    if not bool(lost <= LOSS * largest):
        raise HubError(
            f"{module}: the scale {scale:g} cannot be folded into lora_B, whose largest number "
            f"would be {float(largest):.3g} in float32",
            "train the expert again with a lora_alpha closer to its rank",
        )
    return folded


def _parse(name: str) -> tuple[str, int]:
    """Return the module that a factor belongs to, and the factor's dimension that is the rank."""
    found = FACTOR.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not the name of a factor of a LoRA")
    return found[1], -2 if "A" in found.groups()[1:] else -1


def _name_class(model_class: str) -> dict[str, str]:
    """Return the entry by which PEFT's AutoPeftModel finds the class of the model."""
    return {"base_model_class": model_class, "parent_library": "transformers"}


def _flatten(tensor: Tensor, side: int) -> Tensor:
    """Lay the factors of a stack out as PEFT does: A is `[N * R, I]`, B is `[O, R * N]`."""
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, 1) if side == -2 else tensor.permute(1, 2, 0).flatten(1)


def _pad(tensor: Tensor, rank: int, side: int) -> Tensor:
    """Pad one dimension of a factor with zeros."""
    shape = list(tensor.shape)
    shape[side] = rank - shape[side]
    return torch.cat([tensor, tensor.new_zeros(shape)], side)
