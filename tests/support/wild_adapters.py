"""One hundred small adapters, in the proportions that were counted in public repositories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft_kinds import make_adapter
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf_lora

PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_modules": ["q_proj", "down_proj"],
}
# What versions of peft added to the configuration.
LATER = {
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "use_rslora": False,
    "use_dora": False,
}
NEWEST = {
    "eva_config": None,
    "corda_config": None,
    "exclude_modules": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "peft_version": "0.21.2",
}


def write_peft(base: Path, folder: Path, number: int = 0, **config: Any) -> Path:
    """A LoRA as peft saves it, on the two-layer Llama of these tests."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for layer in range(2):
        for module, inputs in (("self_attn.q_proj", 32), ("mlp.down_proj", 48)):
            path = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(32, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = PLAIN | {"base_model_name_or_path": str(base)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_head(base: Path, folder: Path, number: int, name: str) -> Path:
    """A LoRA with the head of a classifier, which peft adds by itself."""
    write_peft(base, folder, number, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    _edit(folder, lambda t: t | {f"base_model.model.{name}.weight": torch.ones(2, 32)})
    return folder


def write_pickle(base: Path, folder: Path, number: int) -> Path:
    """A LoRA that was saved as a pickle."""
    write_peft(base, folder, number)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def write_mlx(base: Path, folder: Path, number: int, kind: str = "lora", **more: Any) -> Path:
    """An adapter of mlx-lm."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_a"] = torch.randn(32, 2, generator=generator)
        tensors[f"{path}.lora_b"] = torch.randn(2, 32, generator=generator)
        if kind == "dora":
            tensors[f"{path}.m"] = torch.rand(32, generator=generator) + 0.5
    save_file(tensors, folder / "adapters.safetensors")
    config = {
        "model": str(base),
        "fine_tune_type": kind,
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0} | more,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_kohya(folder: Path, part: str = "lora_te_model_layers_0_self_attn_q_proj") -> Path:
    """A LoRA of kohya's scripts."""
    folder.mkdir(parents=True)
    tensors = {
        f"{part}.lora_down.weight": torch.randn(2, 32),
        f"{part}.lora_up.weight": torch.randn(32, 2),
        f"{part}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, folder / "lora.safetensors", metadata={"ss_network_dim": "2"})
    return folder


def write_diffusers(folder: Path, part: str = "unet.down_blocks.0") -> Path:
    """A LoRA of diffusers."""
    folder.mkdir(parents=True)
    tensors = {
        f"{part}.q_proj.lora_A.weight": torch.randn(2, 32),
        f"{part}.q_proj.lora_B.weight": torch.randn(32, 2),
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def write_prompt(base: Path, folder: Path, kind: str) -> Path:
    """Trained tokens before the input, or trained keys and values of two layers."""
    folder.mkdir(parents=True)
    width = 32 * (4 if kind == "PREFIX_TUNING" else 1)
    save_file({"prompt_embeddings": torch.randn(4, width)}, folder / "adapter_model.safetensors")
    config = {
        **{"num_layers": 2, "num_attention_heads": 4, "token_dim": 32},
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
    """Change the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def write_all(base: Path, place: Path) -> list[tuple[str, str, Path]]:
    """Write the hundred; return the program, the case and the folder of each."""
    found: list[tuple[str, str, Path]] = []

    def put(program: str, case: str, write: Callable[[Path, int], object]) -> None:
        folder = place / f"{len(found):03d}"
        write(folder, len(found))
        found.append((program, case, folder))

    def lora(case: str, **config: Any) -> None:
        put("peft", case, lambda folder, n: write_peft(base, folder, n, **config))

    def other(case: str, kind: str, **more: Any) -> None:
        put("peft", case, lambda folder, n: make_adapter(kind, base, folder, "llama", **more))

    for name in ["score"] * 4 + ["classifier"] * 2:
        put("peft", "head of a classifier", lambda f, n, name=name: write_head(base, f, n, name))
    for _ in range(2):
        lora("`enable_lora` and `merge_weights`", enable_lora=None, merge_weights=False)
        mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models"}
        lora("`auto_mapping`", auto_mapping=mapping)
        put("peft", "pickle alone", lambda folder, n: write_pickle(base, folder, n))
        other("DoRA", "DoRA")
    lora("rsLoRA", use_rslora=True)
    lora("EVA", init_lora_weights="eva")
    other("PiSSA", "PiSSA")
    for kind in ("AdaLoRA", "IA3", "LoHa", "LoKr", "VeRA"):
        other(kind, kind)
    put("peft", "prompt tuning", lambda folder, n: write_prompt(base, folder, "PROMPT_TUNING"))
    put("peft", "prefix tuning", lambda folder, n: write_prompt(base, folder, "PREFIX_TUNING"))
    lora("key of a newer peft, unset", future_key=None, peft_version="0.99.0")
    lora("key of a newer peft, set", future_key=3, peft_version="0.99.0")
    lora("`layer_replication`", layer_replication=[[0, 2]])
    lora("aLoRA", alora_invocation_tokens=[1, 2])
    lora("weights of half of its targets", target_modules=["q_proj", "down_proj", "v_proj"])
    lora("name of the adapter in its keys")
    _edit(
        found[-1][2],
        lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()},
    )
    while len(found) < 83:
        lora("plain LoRA", **((), LATER, LATER | NEWEST)[len(found) % 3] or {})
    for _ in range(9):
        put("mlx-lm", "LoRA", lambda folder, n: write_mlx(base, folder, n))
    put("mlx-lm", "DoRA", lambda folder, n: write_mlx(base, folder, n, "dora"))
    put("mlx-lm", "LoRA with an `alpha`", lambda folder, n: write_mlx(base, folder, n, alpha=16))
    put("diffusers", "image generator", lambda folder, n: write_diffusers(folder))
    put("others", "kohya, text encoder", lambda folder, n: write_kohya(folder))
    put("others", "kohya, image generator", lambda f, n: write_kohya(f, "lora_unet_down_attn_q"))
    put("others", "llama.cpp", lambda folder, n: _write_gguf(folder))
    put("others", "checkpoints in sub-folders", lambda f, n: _write_checkpoints(base, f, n))
    put("others", "AdapterHub", lambda folder, n: _write_adapter_hub(folder))
    return found


def _write_gguf(folder: Path) -> None:
    folder.mkdir()
    write_gguf_lora(folder / "lora.gguf", 2)


def _write_checkpoints(base: Path, folder: Path, number: int) -> None:
    for step in (100, 200):
        write_peft(base, folder / f"checkpoint-{step}", number + step)


def _write_adapter_hub(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"config": {"original_ln_after": True}}))
    torch.save({"bert.adapters.down": torch.ones(2, 2)}, folder / "pytorch_adapter.bin")
