"""The kind of LoRA adapters in PEFT's format, with or without PHATGOOSE gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from experthub.hub.formats.added_tokens import EXPERT_TOKENIZER, read_added_tokens
from experthub.hub.formats.dense_parts import TOKEN_ROWS, read_dense_parts
from experthub.hub.kinds.footprint import BaseShapes, Footprint, count_other_rows
from experthub.hub.kinds.kind import Changes, ExpertKind, kinds
from experthub.hub.kinds.placement import make_delta
from experthub.hub.kinds.stored_expert import StoredExpert


def _check(folder: Path) -> list[str]:
    """Check an adapter and its gates; return the names of their files."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise IntegrityError(
            f"{folder} has no {ADAPTER_CONFIG}", "copy the file that peft wrote beside the weights"
        )
    adapted = read_adapter(folder / ADAPTER_CONFIG, folder / ADAPTER, str(folder))
    parts = read_dense_parts(folder / ADAPTER_CONFIG, folder / ADAPTER, str(folder))
    names = [ADAPTER, ADAPTER_CONFIG]
    if any(part.parameter.endswith(TOKEN_ROWS) for part in parts):
        own = {n: folder / n for n in EXPERT_TOKENIZER if (folder / n).is_file()}
        read_added_tokens(own, str(folder))
        names += own
    if not (folder / GATES).is_file():
        return names
    check_gates(read_gates(folder / GATES), adapted, str(folder))
    return [*names, GATES]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read which modules an adapter changes, and which modules have a gate."""
    config = expert.verify(ADAPTER_CONFIG)
    adapted = read_adapter(config, expert.locate(ADAPTER), expert.name)
    shapes, placed = expert.check_low_rank(adapted)
    found = Footprint(shapes, placed, tokens=expert.read_tokens())
    if GATES in expert.files:
        gates = read_gates(expert.locate(GATES))
        own_gates = expert.compute_once(gates, lambda: _place_gates(expert, gates))
        found = replace(found, gated=own_gates)
    if parts := read_dense_parts(config, expert.locate(ADAPTER), expert.name):
        from experthub.hub.kinds.dense_changes import check_dense_parts, count_rows

        dense, copies = check_dense_parts(expert, parts)
        own = {name: count_rows(dense[name], expert.base.shapes[name]) for name in dense}
        found = replace(found, shapes=shapes | own, dense=dense, copies=copies)
    return replace(found, rows=count_other_rows(found.shapes, expert.base))


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


def _load_dense(contents: Mapping[str, Any], footprint: Footprint, base: BaseShapes) -> Changes:
    """Return for each parameter with dense parts a function that makes its change in float32."""
    from experthub.hub.formats.safetensors_reader import Tensors
    from experthub.hub.kinds.dense_changes import load_dense_changes

    return load_dense_changes(Tensors(contents[ADAPTER]), footprint.dense, base)


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
        companions=EXPERT_TOKENIZER,
        check=_check,
        footprint=_footprint,
        load=_load,
        load_dense=_load_dense,
        mapped=(ADAPTER,),
        low_rank=True,
        peft=True,
        base_name=_base_name,
    )
)
