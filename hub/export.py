"""Writing merged compositions for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from experthub.hub import _yaml
from experthub.hub._files import check_free, new_folder, write_json, write_text
from experthub.hub.bases import load_tokenizer, without_bars
from experthub.hub.errors import UsageError
from experthub.hub.expert import ADAPTER, ADAPTER_CONFIG
from experthub.hub.formats.adapter import PREFIX
from experthub.merge import Delta, LowRank
from torch import Tensor

if TYPE_CHECKING:
    from experthub.hub.composition import Composition


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
        write_text(draft / "recipe.lock.yaml", _yaml.dump(composition.lock))
    return folder


def _save_peft(composition: Composition, folder: Path) -> None:
    """One LoRA with the scales folded into B, of one rank: smaller ones are padded with zeros."""
    from safetensors.torch import save_file

    merged: Mapping[str, Delta] = composition.merged or {}
    deltas = {name: merged[name] for name in merged}
    how = {f"{a.module}.weight": a for m in composition.plan.members for a in m.adapted}
    low = {n: d for n, d in deltas.items() if isinstance(d, LowRank) and n in how}
    if len(low) < len(deltas) or any(how[n].embedding for n in low):
        raise UsageError(
            "the merge is not low-rank on linear modules", "save it with the format hf"
        )
    rank = max(delta.rank for delta in low.values())
    tensors: dict[str, Tensor] = {}
    for name, delta in low.items():
        a, b = delta.a, delta.b * delta.scale
        if how[name].transposed:
            a, b = b.T, a.T
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = _padded(a, rank, 0)
        tensors[f"{module}.lora_B.weight"] = _padded(b, rank, 1)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if composition.plan.base.causal else "FEATURE_EXTRACTION",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "fan_in_fan_out": any(how[n].transposed for n in low),
        "target_modules": sorted(n.removesuffix(".weight") for n in low),
        "base_model_name_or_path": composition.plan.base.name,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def _padded(tensor: Tensor, rank: int, side: int) -> Tensor:
    missing = rank - tensor.shape[side]
    shape = list(tensor.shape)
    shape[side] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], side).contiguous()
