"""Adapters of kohya's sd-scripts and LyCORIS: `lora_down`, `lora_up` and `alpha` per module.

Their names have underscores for the dots of a module's path, so a base is needed to read them,
unless the names have dots.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from experthub.hub.conversion.base_weights import StoredBase
from experthub.hub.conversion.file_formats.peft_files import open_tensors
from experthub.hub.conversion.foreign_adapter import ForeignAdapter, LazyTensors, sort_patterns
from experthub.hub.conversion.found_adapter import FoundAdapter
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.dense_parts import PREFIX
from torch import Tensor

STARTS = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_", "lora_")
FACTORS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
TYPES = {"lora_down.weight": "LORA", "hada_w1_a": "LOHA", "lokr_w1": "LOKR", "lokr_w1_a": "LOKR"}
TENSOR = re.compile(
    r"(.+?)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale|(?:hada|lokr)_\w+)"
)


def read(found: FoundAdapter, base: StoredBase | None) -> ForeignAdapter:
    """Read an adapter of kohya or LyCORIS.

    Args:
        found: The adapter.
        base: The base, whose modules the names are compared with.

    Returns:
        The adapter in peft's form.

    Raises:
        IntegrityError: A tensor has another form, or a module is not in the base.
    """
    groups = _group(found, open_tensors(found.weights))
    kinds = {TYPES[name] for group in groups.values() for name in group if name in TYPES}
    if len(kinds) != 1:
        raise IntegrityError(
            f"{found.weights} mixes the types {', '.join(sorted(kinds)) or '(none)'}",
            "train again with one type, or merge the adapter with the program that wrote it",
        )
    kind = kinds.pop()
    paths = _find_paths(groups, base, found)
    tensors: dict[str, Callable[[], Tensor]] = {}
    ranks, alphas = {}, {}
    for name, group in groups.items():
        path = paths[name]
        rank = ranks[path] = _find_rank(kind, group)
        own = group.pop("alpha", None)
        alphas[path] = float(own()) if own else float(rank)
        if kind == "LOKR" and "lokr_w1" in group and "lokr_w2" in group:
            alphas[path] = float(rank)  # LyCORIS ignores alpha if neither factor is split.
        for factor, reader in group.items():
            if factor == "dora_scale":
                factor, reader = "lora_magnitude_vector", _flatten(reader)
            tensors[f"{PREFIX}{path}.{FACTORS.get(factor, factor)}"] = reader
    alpha = "lora_alpha" if kind == "LORA" else "alpha"
    config: dict[str, Any] = {
        "peft_type": kind,
        "r": max(ranks.values()),
        alpha: max(alphas.values()),
        "rank_pattern": sort_patterns(ranks),
        "alpha_pattern": sort_patterns(alphas),
        "target_modules": sorted(ranks),
        "base_model_name_or_path": base.base.name if base else None,
    }
    if any("dora_scale" in name for name in open_tensors(found.weights)):
        if kind != "LORA":
            raise IntegrityError(
                f"{found.weights} has DoRA's magnitudes on {kind}",
                "merge the adapter with the program that wrote it, and use hub diff",
            )
        config["use_dora"] = True
    return ForeignAdapter(str(found.weights), config, LazyTensors(tensors))


def _flatten(reader: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that reads a column of magnitudes as a vector."""

    def read() -> Tensor:
        found = reader()
        if found.ndim == 2 and found.shape[0] == 1:
            raise IntegrityError(
                "dora_scale has one magnitude for each input, and the hub knows those of outputs",
                "merge the adapter with the program that wrote it, and use hub diff",
            )
        return found.flatten()

    return read


def _group(
    found: FoundAdapter, readers: Mapping[str, Callable[[], Tensor]]
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Group the tensors by the names of modules in the file."""
    groups: dict[str, dict[str, Callable[[], Tensor]]] = defaultdict(dict)
    for name, reader in readers.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            raise IntegrityError(
                f"{found.weights}: tensor {name} is no part of a LoRA of kohya or LyCORIS",
                "merge the adapter with the program that wrote it, and use hub diff",
            )
        groups[match[1]][match[2]] = reader
    return dict(groups)


def _find_rank(kind: str, group: Mapping[str, Callable[[], Tensor]]) -> int:
    """Return the rank of a module by the shape of one of its factors."""
    if kind == "LORA":
        return int(group["lora_down.weight"]().shape[0])
    if kind == "LOHA":
        return int(group["hada_w1_b"]().shape[0])
    split = next((n for n in ("lokr_w2_b", "lokr_w1_b") if n in group), None)
    return int(group[split]().shape[0]) if split else 1


def _find_paths(
    groups: Mapping[str, Any], base: StoredBase | None, found: FoundAdapter
) -> dict[str, str]:
    """Find the path of each module: the names have underscores for dots."""
    paths = {}
    for name in groups:
        if "." in name:
            paths[name] = name.removeprefix("diffusion_model.")
            continue
        if base is None:
            raise IntegrityError(f"{found.weights} needs a base", "use --base")
        modules = {
            n.removesuffix(".weight").replace(".", "_"): n.removesuffix(".weight")
            for n in base.base.shapes
            if n.endswith(".weight")
        }
        plain = next((name.removeprefix(s) for s in STARTS if name.startswith(s)), name)
        path = modules.get(plain)
        if path is None:
            raise IntegrityError(
                f"{found.weights} adapts {name}, which is no module of {base.base.name}",
                "use the base that the adapter was trained on; the hub has no image generators",
            )
        paths[name] = path
    return paths
