"""A valid folder of each kind of expert, written directly, for attacks on the door of the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import make_expert
from safetensors.torch import save_file

DIGEST = "sha256:" + "0" * 64
NORM = "model.norm.weight"


def _lora(folder: Path, base: Path) -> None:
    make_expert(folder, base, 1)


def _task_vector(folder: Path, base: Path) -> None:
    folder.mkdir()
    save_file({NORM: torch.ones(32)}, folder / "task_vector.safetensors")


def _shards(folder: Path, base: Path) -> None:
    folder.mkdir()
    names = [f"task_vector-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = [NORM, "model.layers.0.input_layernorm.weight"]
    for file, name in zip(names, tensors, strict=True):
        save_file({name: torch.ones(32)}, folder / file)
    index = {"weight_map": dict(zip(tensors, names, strict=True))}
    (folder / "task_vector.safetensors.index.json").write_text(json.dumps(index))


def _coefficients(folder: Path, base: Path) -> None:
    folder.mkdir()
    record = {"method": "adamerging", "granularity": "model", "blocks": ["model"]}
    record |= {"experts": [{"expert": "a", "digest": DIGEST}]}
    (folder / "coefficients.json").write_text(json.dumps(record))
    save_file({"coefficients": torch.ones(1, 1)}, folder / "coefficients.safetensors")


def _skills(folder: Path, base: Path) -> None:
    folder.mkdir()
    module = "model.layers.0.self_attn.q_proj"
    record = {"router": "poly", "n_skills": 2, "n_heads": 1, "rank": 4, "alpha": 8, "tasks": ["t"]}
    record |= {"target_modules": [module], "base": str(base), "granularity": "linear"}
    (folder / "skills.json").write_text(json.dumps(record))
    tensors = {"skill_a": torch.ones(2, 4, 32), "skill_b": torch.ones(2, 32, 4)}
    tensors["logits"] = torch.ones(1, 1, 2)
    save_file({f"{module}.{n}": t for n, t in tensors.items()}, folder / "skills.safetensors")


def _router(folder: Path, base: Path) -> None:
    folder.mkdir()
    record = {"method": "retrieval", "experts": [{"expert": "a", "digest": DIGEST}]}
    (folder / "router.json").write_text(json.dumps(record))
    save_file({"index": torch.ones(3, 4)}, folder / "router.safetensors")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "lora": _lora,
    "task_vector": _task_vector,
    "shards": _shards,
    "coefficients": _coefficients,
    "skills": _skills,
    "router": _router,
}


def break_numbers(path: Path) -> bytes:
    """The bytes of a safetensors file with NaN in the place of its last number."""
    return path.read_bytes()[:-4] + b"\xff\xff\xff\x7f"
