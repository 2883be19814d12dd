"""Writing compositions and experts for other programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from experthub.hub.bases.base import load_tokenizer, without_bars
from experthub.hub.composition.weights import Tensors
from experthub.hub.errors import UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import check_free, new_folder, write_json, write_text
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import PREFIX, read_adapter
from experthub.hub.registry.expert import ADAPTER, ADAPTER_CONFIG, Expert
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.merge import Delta, LowRank
from torch import Tensor

if TYPE_CHECKING:
    from experthub.hub.composition.composition import Composition


def save(composition: Composition, folder: Path, format: Literal["hf", "peft"]) -> Path:
    """See `Composition.save`."""
    if composition.merged is None:
        raise UsageError(
            "a routed model is more than a set of weights",
            "keep its recipe and compose it where it is used, or write merge: instead of route:",
        )
    check_free(folder)
    with new_folder(folder) as draft:
        if format == "peft":
            _save_peft(composition, draft)
        else:
            with without_bars():
                composition.model.save_pretrained(draft)
            if composition.plan.base.has_tokenizer:
                load_tokenizer(composition.plan.base).save_pretrained(draft)
        write_text(draft / "recipe.lock.yaml", yaml_files.dump(composition.lock))
    return folder


def _save_peft(composition: Composition, folder: Path) -> None:
    """One LoRA in the portable profile."""
    merged: Mapping[str, Delta] = composition.merged or {}
    deltas = {name: merged[name] for name in merged}
    how = {f"{a.module}.weight": a for m in composition.plan.members for a in m.adapted}
    low = {n: d for n, d in deltas.items() if isinstance(d, LowRank) and n in how}
    if len(low) < len(deltas) or any(how[n].embedding for n in low):
        raise UsageError(
            "the merge is not low-rank on linear modules", "save it with the format hf"
        )
    tensors: dict[str, Tensor] = {}
    for name, delta in low.items():
        a, b = delta.a, delta.b * delta.scale
        if how[name].transposed:
            a, b = b.T, a.T
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = a
        tensors[f"{module}.lora_B.weight"] = b
    modules = [name.removesuffix(".weight") for name in low]
    task_type = "CAUSAL_LM" if composition.plan.base.causal else "FEATURE_EXTRACTION"
    transposed = any(how[n].transposed for n in low)
    write_portable(folder, tensors, modules, composition.plan.base.name, task_type, transposed)


def export_portable(expert: Expert, folder: Path, registry: Registry, store: Store) -> Path:
    """Write an expert as a folder that peft, vLLM, SGLang and llama.cpp load alike.

    One rank, no patterns, and the scale folded into B: of the factors' own dtype where that is
    exact, in float32 elsewhere.  Gates are left out.  Raises UsageError for a task vector.
    """
    if expert.kind != "lora":
        raise UsageError(
            f"{expert.reference} is a task vector, and the profile is for LoRAs",
            "compose it and save the model (hub compose --out), or hub diff --rank",
        )
    check_free(folder)
    config = store.file(expert.digest, ADAPTER_CONFIG)
    adapted = read_adapter(config, store.locate(expert.digest, ADAPTER), expert.reference)
    stored = Tensors(store.read(expert.digest, ADAPTER))
    exact = all(math.frexp(change.scale)[0] == 0.5 for change in adapted)  # a power of two
    tensors: dict[str, Tensor] = {}
    for change in adapted:
        a, b = stored[change.a], stored[change.b]
        tensors[change.a], tensors[change.b] = (
            (a, b * change.scale) if exact else (a.float(), b.float() * change.scale)
        )
    known = registry.bases().get(expert.base)
    base = known.aka[0] if known and known.aka else expert.base
    settings = read_json(config)
    with new_folder(folder) as draft:
        write_portable(
            draft,
            tensors,
            [change.module for change in adapted],
            base,
            settings.get("task_type"),
            bool(settings.get("fan_in_fan_out")),
        )
    return folder


def write_portable(
    folder: Path,
    tensors: dict[str, Tensor],
    modules: list[str],
    base: str,
    task_type: str | None,
    transposed: bool,
) -> None:
    """A LoRA of one rank, smaller ones padded with zeros; tensors: under PEFT's names."""
    from safetensors.torch import save_file

    first = {name: 0 if "lora_A" in name or "embedding_A" in name else 1 for name in tensors}
    rank = max(tensor.shape[first[name]] for name, tensor in tensors.items())
    padded = {name: _padded(tensor, rank, first[name]) for name, tensor in tensors.items()}
    save_file(padded, folder / ADAPTER, metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "fan_in_fan_out": transposed,
        "target_modules": sorted(modules),
        "base_model_name_or_path": base,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def _padded(tensor: Tensor, rank: int, side: int) -> Tensor:
    missing = rank - tensor.shape[side]
    shape = list(tensor.shape)
    shape[side] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], side).contiguous()
