"""The kind of LoRA adapters in PEFT's format, with or without PHATGOOSE gates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import (
    ADAPTER,
    ADAPTER_CONFIG,
    GATES,
    Adapted,
    check_gates,
    read_adapter,
    read_gates,
)
from experthub.hub.kinds.kind import Changes, ExpertKind, kinds
from experthub.hub.kinds.placement import make_delta
from experthub.hub.kinds.stored_expert import BaseShapes, Footprint, StoredExpert


def _check(folder: Path) -> list[str]:
    """Check an adapter and its gates; return the names of their files."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise IntegrityError(
            f"{folder} has no {ADAPTER_CONFIG}", "copy the file that peft wrote beside the weights"
        )
    adapted = read_adapter(folder / ADAPTER_CONFIG, folder / ADAPTER, str(folder))
    if not (folder / GATES).is_file():
        return [ADAPTER, ADAPTER_CONFIG]
    check_gates(read_gates(folder / GATES), adapted, str(folder))
    return [ADAPTER, ADAPTER_CONFIG, GATES]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read which modules an adapter changes, and which modules have a gate."""
    config = expert.verify(ADAPTER_CONFIG)
    adapted = read_adapter(config, expert.locate(ADAPTER), expert.name)
    shapes, placed = expert.check_low_rank(adapted)
    if GATES not in expert.files:
        return Footprint(shapes, placed)
    gates = read_gates(expert.locate(GATES))
    return Footprint(
        shapes, placed, expert.compute_once(gates, lambda: _place_gates(expert, gates))
    )


def _place_gates(expert: StoredExpert, gates: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the module that each gate belongs to, with the name of the gate's tensor."""
    located = {module: expert.base.names.locate_module(module) for module in gates}
    return {place: f"{module}.gate" for module, place in located.items() if place}


def _load(contents: Mapping[str, Any], footprint: Footprint, base: BaseShapes) -> Changes:
    """Return for each adapted weight a function that makes its low-rank change in float32."""
    from experthub.hub.formats.safetensors_reader import Tensors

    tensors = Tensors(contents[ADAPTER])
    found: dict[str, list[Adapted]] = {}
    for change in footprint.adapted:
        found.setdefault(change.parameter, []).append(change)
    shapes = footprint.shapes
    return {name: partial(make_delta, own, tensors, shapes[name]) for name, own in found.items()}


def _base_name(folder: Path) -> str | None:
    """Return the name of the base in an adapter's configuration."""
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return str(named) if named else None


LORA = kinds.register(
    ExpertKind(
        name="lora",
        label="a LoRA",
        marks=(ADAPTER,),
        files=(ADAPTER_CONFIG, ADAPTER),
        check=_check,
        footprint=_footprint,
        load=_load,
        mapped=(ADAPTER,),
        low_rank=True,
        peft=True,
        base_name=_base_name,
    )
)
