"""Adapters of every type that peft makes, with random weights, and peft's own merged weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5}),
    "rsLoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "LoRA, biases of B": ("LoraConfig", {"r": 3, "lora_alpha": 5, "lora_bias": True}),
    "LoRA, bias all": ("LoraConfig", {"r": 3, "bias": "all"}),
    "LoRA, bias lora_only": ("LoraConfig", {"r": 3, "bias": "lora_only"}),
    "PiSSA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}),
    "PiSSA, DoRA": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa", "use_dora": True},
    ),
    "OLoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "init_lora_weights": "olora"}),
    "MiCA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "init_lora_weights": "mica"}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 5}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "LoHa, large rank": ("LoHaConfig", {"r": 8, "alpha": 5}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "LoKr, both split": ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True}),
    "VeRA": ("VeraConfig", {"r": 6}),
    "VeRA, drawn": ("VeraConfig", {"r": 6, "save_projection": False, "projection_prng_key": 3}),
    "IA3": ("IA3Config", {}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "OFT, Neumann": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 4}),
    "OFT, shared": ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "OFT, constrained": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.1}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "HRA": ("HRAConfig", {"r": 4}),
    "HRA, orthogonal": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20}),
    "VB-LoRA": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 10, "r": 3}),
    "VB-LoRA, best only": (
        "VBLoRAConfig",
        {"vector_length": 8, "num_vectors": 10, "r": 3, "save_only_topk_weights": True},
    ),
    "Layer-norm tuning": ("LNTuningConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "SHiRA": ("ShiraConfig", {"r": 2}),
    "MiSS": ("MissConfig", {"r": 5}),
    "DeLoRA": ("DeloraConfig", {"r": 3}),
    "HiRA": ("HiraConfig", {"r": 3}),
    "RoAd 1": ("RoadConfig", {"group_size": 8, "variant": "road_1"}),
    "RoAd 2": ("RoadConfig", {"group_size": 8, "variant": "road_2"}),
    "RoAd 4": ("RoadConfig", {"group_size": 8, "variant": "road_4"}),
}
# Modules of each architecture: of attention and of the feed-forward part.
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "neox": ["query_key_value", "dense_4h_to_h"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "wo"],
    "phi3": ["qkv_proj", "down_proj"],
}


def make_base(architecture: str, folder: Path) -> Path:
    """A tiny random model, which is saved in a folder."""
    import transformers as t

    torch.manual_seed(7)
    common = {"vocab_size": 104, "initializer_range": 0.3}
    model: Any
    if architecture == "llama":
        model = t.LlamaForCausalLM(
            t.LlamaConfig(
                **common,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                attention_bias=True,
            )
        )
    elif architecture == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        )
    elif architecture == "neox":
        model = t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(
                **common,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    elif architecture == "bert":
        model = t.BertModel(
            t.BertConfig(
                **common,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    elif architecture == "t5":
        model = t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=104, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        )
    else:
        model = t.Phi3ForCausalLM(
            t.Phi3Config(
                **common,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=0,
            )
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """Load a saved model in float32."""
    import json

    import transformers as t

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(t, config["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(kind: str, base: Path, folder: Path, architecture: str, **more: Any) -> Any:
    """Save an adapter with random weights as peft does, and return peft's model."""
    name, settings = TYPES[kind]
    settings = dict(settings) | more
    if name != "LNTuningConfig":
        settings.setdefault("target_modules", TARGETS[architecture])
    if name == "IA3Config":
        settings["feedforward_modules"] = [TARGETS[architecture][1]]
    model = load(base)
    if name == "LNTuningConfig" and architecture == "bert":
        settings["target_modules"] = ["LayerNorm"]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, getattr(peft, name)(**settings))
        made.peft_config["default"].base_model_name_or_path = str(base)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
        made.eval().save_pretrained(folder)
    return made


def reload_merged(base: Path, folder: Path) -> Any:
    """Load a saved adapter with peft on its base, in float64, and merge it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.PeftModel.from_pretrained(load(base), folder).double().eval()
        return made.merge_and_unload()


def lacks_biases(kind: str, base: Path, architecture: str) -> bool:
    """Tell whether the adapter changes biases of modules, one of which has none."""
    if kind != "LoRA, biases of B":
        return False
    names = dict(load(base).named_parameters())
    modules = [n.removesuffix(".weight") for n in names if n.endswith(".weight")]
    ends = tuple(f".{target}" for target in TARGETS[architecture])
    return any(f"{m}.bias" not in names for m in modules if m.endswith(ends))


def read_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """The changes of parameters in a folder of the hub, in float64."""
    from experthub.hub.formats.adapter import read_adapter
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {k: v.double() for k, v in load_file(folder / "task_vector.safetensors").items()}
    found, tensors = {}, load_file(file)
    for one in read_adapter(folder / "adapter_config.json", file, "x"):
        change = one.scale * tensors[one.b].double() @ tensors[one.a].double()
        found[f"{one.module}.weight"] = change.T if one.transposed or one.embedding else change
    return found


def measure(base: Path, adapter: Path, out: Path) -> tuple[float, float, Any]:
    """Convert an adapter; return the largest difference to peft, the largest change, and the result."""
    from experthub import hub

    made = hub.convert(adapter, out)
    got, before = read_deltas(out), dict(load(base).named_parameters())
    difference = largest = 0.0
    for name, parameter in reload_merged(base, adapter).named_parameters():
        true = (parameter - before[name].double()).detach()
        change = got.pop(name, None)
        difference = max(difference, float((true if change is None else change - true).abs().max()))
        largest = max(largest, float(true.abs().max()))
    assert not any(bool(rest.any()) for rest in got.values()), f"more changes: {sorted(got)}"
    return difference, largest, made
