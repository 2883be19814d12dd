"""Adapters of diffusers: `unet.`, `transformer.` or `text_encoder.` before peft's names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from experthub.hub.conversion.file_formats.peft_files import open_tensors
from experthub.hub.conversion.foreign_adapter import ForeignAdapter, LazyTensors, sort_patterns
from experthub.hub.conversion.found_adapter import FoundAdapter, read_metadata
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.dense_parts import PREFIX
from torch import Tensor

PARTS = re.compile(r"(unet|transformer|text_encoder|text_encoder_2|text_encoder_3)\.(.+)")
NAMES = (
    (".lora.down.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora_B.weight"),
    (".lora_linear_layer.down.weight", ".lora_A.weight"),
    (".lora_linear_layer.up.weight", ".lora_B.weight"),
)


def read(found: FoundAdapter) -> ForeignAdapter:
    """Read the part of an adapter of diffusers that changes a text encoder.

    Args:
        found: The adapter.

    Returns:
        The adapter of the text encoder in peft's form.

    Raises:
        IntegrityError: The adapter changes an image generator, or several models.
    """
    readers = open_tensors(found.weights)
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, reader in readers.items():
        match = PARTS.fullmatch(name)
        part, rest = (match[1], match[2]) if match else ("unet", name)
        parts.setdefault(part, {})[rest] = reader
    images = sorted(part for part in parts if not part.startswith("text_encoder"))
    if images:
        raise IntegrityError(
            f"{found.weights} adapts the {images[0]} of an image generator, and the hub has no such bases",
            "use diffusers for it; an adapter of a text encoder alone is converted",
        )
    if len(parts) > 1:
        raise IntegrityError(
            f"{found.weights} adapts {' and '.join(sorted(parts))}",
            "save the adapter of each text encoder on its own",
        )
    ((part, own),) = parts.items()
    tensors, ranks, alphas = {}, {}, {}
    for name, reader in own.items():
        plain = name
        for end, usual in NAMES:
            if plain.endswith(end):
                plain = plain.removesuffix(end) + usual
        if plain.endswith(".alpha"):
            alphas[plain.removesuffix(".alpha")] = float(reader())
            continue
        tensors[PREFIX + plain] = reader
        if plain.endswith(".lora_A.weight"):
            ranks[plain.removesuffix(".lora_A.weight")] = int(reader().shape[0])
    config: dict[str, Any] = {"peft_type": "LORA"} | _read_stated(found, part, ranks, alphas)
    return ForeignAdapter(str(found.weights), config, LazyTensors(tensors))


def _read_stated(
    found: FoundAdapter, part: str, ranks: dict[str, int], alphas: dict[str, float]
) -> dict[str, Any]:
    """Return the configuration in the file's metadata, or else the ranks and scales of its tensors.

    Without both, diffusers takes the rank as alpha.
    """
    stated = read_metadata(found.weights).get("lora_adapter_metadata")
    if stated:
        try:
            values = json.loads(stated)
        except (ValueError, RecursionError):
            values = {}
        own = {k.removeprefix(f"{part}."): v for k, v in values.items() if k.startswith(f"{part}.")}
        if own:
            return own
    scales = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
    return {
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(scales.values(), default=1.0),
        "rank_pattern": sort_patterns(ranks),
        "alpha_pattern": sort_patterns(scales),
        "target_modules": sorted(ranks),
    }
