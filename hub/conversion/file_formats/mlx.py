"""Adapters of mlx-lm: `adapters.safetensors` with `lora_a` `[in, r]` and `lora_b` `[r, out]`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from reprlib import repr as short
from typing import Any

from experthub.hub.bases.base import EMBEDDINGS
from experthub.hub.conversion.file_formats.peft_files import open_tensors
from experthub.hub.conversion.foreign_adapter import ForeignAdapter, LazyTensors
from experthub.hub.conversion.found_adapter import FoundAdapter
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.dense_parts import PREFIX
from torch import Tensor

FUSE = "run mlx_lm.fuse, and store the difference with hub diff BASE FUSED --name NAME"
FACTOR_NAME = re.compile(r"(.+)\.(lora_a|lora_b|m)")


def read(found: FoundAdapter) -> ForeignAdapter:
    """Read an adapter of mlx-lm.

    `y += scale * (x a) b`; DoRA has the norm of every row as `m`.

    Args:
        found: The adapter.

    Returns:
        The adapter in peft's form.

    Raises:
        IntegrityError: The configuration is missing or ambiguous, or a tensor is of another kind.
    """
    readers, kind = open_tensors(found.weights), found.config.get("fine_tune_type", "lora")
    config: dict[str, Any] = {
        "base_model_name_or_path": found.config.get("model"),
        "task_type": "CAUSAL_LM",
    }
    if kind == "full":
        raise IntegrityError(
            f"{found.folder} is a full fine-tune of mlx-lm, not an adapter",
            FUSE,
        )
    if kind not in ("lora", "dora"):
        raise IntegrityError(
            f"{found.folder}: fine_tune_type is {short(kind)}",
            FUSE,
        )
    tensors: dict[str, Callable[[], Tensor]] = {}
    rank = 0
    for name, reader in readers.items():
        match = FACTOR_NAME.fullmatch(name)
        if match is None:
            raise IntegrityError(
                f"{found.weights}: tensor {name} is no factor of a LoRA",
                FUSE,
            )
        tensor = reader()
        if match[2] != "m" and tensor.ndim != 2:
            raise IntegrityError(
                f"{found.weights}: {name} is {list(tensor.shape)}, the factors of several experts",
                FUSE,
            )
        if match[2] == "lora_a":
            rank = tensor.shape[1]
        tensors[PREFIX + _rename(match[1], match[2])] = partial(_read_transposed, reader)
    scale = _read_scale(found)
    config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": kind == "dora",
        "target_modules": sorted(
            {n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in tensors if ".lora_" in n}
        ),
    }
    return ForeignAdapter(str(found.folder), config, LazyTensors(tensors))


def _read_transposed(reader: Callable[[], Tensor]) -> Tensor:
    """Read a factor in peft's orientation; a vector stays as it is."""
    return reader().T.contiguous() if reader().ndim == 2 else reader()


def _rename(module: str, factor: str) -> str:
    """Return peft's name of a tensor, which depends on the kind of the module."""
    if factor == "m":
        return f"{module}.lora_magnitude_vector"
    letter = factor[-1].upper()
    if f"{module}.weight".endswith(EMBEDDINGS):
        return f"{module}.lora_embedding_{letter}"
    return f"{module}.lora_{letter}.weight"


def _read_scale(found: FoundAdapter) -> float:
    """Return the factor of the change; refuse a configuration that versions of mlx-lm read otherwise."""
    settings = found.config.get("lora_parameters")
    if not isinstance(settings, dict) or not isinstance(settings.get("scale"), int | float):
        raise IntegrityError(
            f"{found.folder}: adapter_config.json has no scale under lora_parameters",
            "copy the file that mlx-lm wrote beside the weights",
        )
    scale, alpha, rank = float(settings["scale"]), settings.get("alpha"), settings.get("rank")
    if alpha is not None and alpha != rank:
        before = scale * float(alpha) / float(rank or 1)
        raise IntegrityError(
            f"{found.folder}: lora_parameters has an alpha, which mlx-lm multiplied by until 0.19: the "
            f"scale was {before:g} then, and is {scale:g} now",
            f"remove alpha from adapter_config.json, and set scale to {before:g} if an old mlx-lm "
            "trained the adapter",
        )
    return scale
