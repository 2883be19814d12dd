"""Quantised bases: routes run beside packed weights, merges want ordinary ones, errors say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_expert, run_hub, tiny_llama
from experthub import hub
from experthub.hub.files import yaml_files
from experthub.hub.formats.quantisation import find_original_name, read_quantisation
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from safetensors.torch import load_file, save_file
from torch import Tensor

IDS = torch.arange(10, 30)[None]
BLOCK = 32
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    made = {
        k: v for name, tensor in load_file(path).items() for k, v in change(name, tensor).items()
    }
    save_file(made, path, metadata={"format": "pt"})


def to_float8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as blocks of float8 with a scale for each, and what they stand for."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = packed.double() * scales[:, None, :, None].double()
    stored = {name: packed.view(rows, columns), f"{name}_scale_inv": scales}
    return stored, meant.view(rows, columns)


def float8_base(folder: Path) -> dict[str, Tensor]:
    """Turn the projections of a base into blocks of float8, as DeepSeek-V3 stores them."""
    meant = {}

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if "proj" not in name:
            return {name: tensor}
        stored, meant[name] = to_float8(name, tensor)
        return stored

    edit_weights(folder, change)
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    edit_config(folder, quantization_config=stated | {"weight_block_size": [BLOCK, BLOCK]})
    return meant


def bare_float8_base(folder: Path) -> dict[str, Tensor]:
    """Store the projections of a base in float8 without scales, as some converters do."""
    meant = {}

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if "proj" in name:
            tensor = tensor.to(torch.float8_e4m3fn)
            meant[name] = tensor.double()
        return {name: tensor}

    edit_weights(folder, change)
    return meant


def add_experts(model: Any, folders: list[Path], weight: float) -> None:
    """Add `weight * 2 B A x` of each expert to every linear module, by hooks."""
    for folder in folders:
        stored = load_file(folder / "adapter_model.safetensors")
        for name, module in model.named_modules():
            a = stored.get(f"base_model.model.{name}.lora_A.weight")
            if a is None:
                continue
            b = stored[f"base_model.model.{name}.lora_B.weight"]

            def add(_: Any, given: Any, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                x = given[0]
                return out + weight * 2 * (x @ a.T.to(x.dtype) @ b.T.to(x.dtype))

            module.register_forward_hook(add)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("make", [float8_base, bare_float8_base])
def test_float8_is_dequantised(make: Callable[[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    """Routes, merges and saved models against the formula in float64."""
    plain = tiny_llama(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    folders = [make_expert(tmp_path / f"expert-{e}", plain, e, size=0.3) for e in (1, 2)]
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    meant = make(base)
    expected_model = transformers.LlamaForCausalLM.from_pretrained(plain).double()
    with torch.no_grad():
        for name, weight in meant.items():
            expected_model.get_parameter(name).copy_(weight)
    bare = logits(expected_model)
    add_experts(expected_model, folders, 0.5)
    expected = logits(expected_model)
    recipe = {"base": str(base), "experts": [*map(str, folders)], "dtype": "float32"}
    routed = hub.compose(recipe | {"route": {"method": "uniform"}})
    torch.testing.assert_close(logits(routed.model).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(routed.detach()).double(), bare, atol=1e-4, rtol=0)
    merged = hub.compose(recipe | {"merge": {"method": "linear"}})
    torch.testing.assert_close(logits(merged.model).double(), expected, atol=1e-4, rtol=0)
    merged.save(tmp_path / "out")
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(saved), logits(merged.model))


def test_the_memory_of_a_dequantised_base_is_that_of_its_dtype(tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    expert = make_expert(tmp_path / "expert", plain, 1)
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    float8_base(base)
    recipe = {"experts": [str(expert)], "merge": {"method": "linear"}, "dtype": "float32"}
    plans = [resolve(Recipe.of(recipe | {"base": str(folder)})) for folder in (plain, base)]
    assert plans[0].memory == plans[1].memory


def test_mxfp4_is_dequantised(tmp_path: Path) -> None:
    """GPT-OSS stores its experts in four bits with a power of two for every 32 entries."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    model = transformers.GptOssForCausalLM(config).eval()
    base = tmp_path / "base"
    model.save_pretrained(base)
    random = torch.Generator().manual_seed(1)
    meant: dict[str, Tensor] = {}

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        shape = experts, outputs, inputs // 32
        packed = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(122, 126, shape, generator=random, dtype=torch.uint8)
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        values = FP4[nibbles.long()].double() * 2.0 ** (scales.double()[..., None] - 127)
        meant[name] = values.flatten(-2).transpose(1, 2)
        return {f"{name}_blocks": packed, f"{name}_scales": scales}

    edit_weights(base, change)
    assert meant
    edit_config(base, quantization_config={"quant_method": "mxfp4"})
    expected_model = (
        model  # Torch multiplies the experts of such a layer in float32, not in float64.
    )
    with torch.no_grad():
        for name, weight in meant.items():
            expected_model.get_parameter(name).copy_(weight)
    expert = tmp_path / "expert"
    make_expert(expert, base, 1, targets=("q_proj", "v_proj"), gates=False, size=0.2)
    add_experts(expected_model, [expert], 1.0)
    recipe = {"base": str(base), "experts": [str(expert)], "dtype": "float32"}
    for how in ({"route": {"method": "uniform"}}, {"merge": {"method": "linear"}}):
        found = logits(hub.compose(recipe | how).model)
        torch.testing.assert_close(found, logits(expected_model), atol=1e-3, rtol=1e-4)


BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("case", BITS)
def test_a_route_on_bitsandbytes(case: str, tmp_path: Path) -> None:
    """Each routed module adds its experts to what the packed module computes of the same input."""
    pytest.importorskip("bitsandbytes", reason="see test_bitsandbytes")
    plain = tiny_llama(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    folders = [make_expert(tmp_path / f"expert-{e}", plain, e, size=0.3) for e in (1, 2)]
    settings = transformers.BitsAndBytesConfig(**BITS[case], bnb_4bit_compute_dtype=torch.float32)
    base = tmp_path / "base"
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    transformers.LlamaForCausalLM.from_pretrained(
        plain, quantization_config=settings, **options
    ).save_pretrained(base)
    alone = transformers.LlamaForCausalLM.from_pretrained(base, **options)
    recipe = {"base": str(base), "experts": [*map(str, folders)], "dtype": "float32"}
    routed = hub.compose(recipe | {"route": {"method": "uniform"}})
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    stored = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for leaf in ("self_attn.q_proj", "mlp.up_proj"):
        name = f"model.layers.1.{leaf}"
        expected = alone.get_submodule(name)(x).double()
        for tensors in stored:
            a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
            b = tensors[f"base_model.model.{name}.lora_B.weight"].double()
            expected += x.double() @ a.T @ b.T
        found = routed.model.get_submodule(name)(x).double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(logits(routed.detach()), logits(alone))


def pretend(folder: Path, **stated: Any) -> Path:
    tiny_llama(folder)
    edit_config(folder, quantization_config=stated)
    return folder


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "a merge": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"merge": {"method": "linear"}},
        2,
        "is quantised in 4 bits by bitsandbytes, and a merge adds to the weights themselves",
    ),
    "no method named": (
        {"load_in_8bit": True},
        {"merge": {"method": "linear"}},
        2,
        "is quantised in 8 bits by bitsandbytes",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {"route": {"method": "uniform"}},
        1,
        "is quantised by GPTQ, which is not supported",
    ),
    "torchao": (
        {"quant_method": "torchao"},
        {"merge": {"method": "linear"}},
        2,
        "is quantised by torchao",
    ),
    "a new method": (
        {"quant_method": "x9"},
        {"route": {"method": "uniform"}},
        1,
        "is quantised by x9, which is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_quantised_base_cannot_do_is_said_in_one_sentence(case: str, tmp_path: Path) -> None:
    stated, how, code, message = REFUSED[case]
    plain = tiny_llama(tmp_path / "plain")
    named = "unsloth/tiny-unsloth-bnb-4bit"
    expert = make_expert(tmp_path / "expert", plain, 1, base_model_name_or_path=named)
    base = pretend(tmp_path / "base", **stated)
    content = {"base": str(base), "experts": [str(expert)], **how}
    Path("recipe.yaml").write_text(yaml_files.dump(content))
    ran = run_hub("compose", "recipe.yaml")
    assert ran.code == code, ran.err
    assert message in ran.err and ran.err.count("error:") == 1
    assert ran.lines("hint:") == ["hint: set base: to the unquantised hf:unsloth/tiny"]


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-1B"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "TheBloke/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("a/b-w4a16", "a/b"),
        ("org/a-fp8-dynamic", "org/a"),
        ("google/gemma-3-270m", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
    ],
)
def test_names_of_quantised_copies(name: str, original: str | None) -> None:
    assert find_original_name(name) == original


def test_a_nested_configuration_is_read() -> None:
    found = read_quantisation({"text_config": {"quantization_config": {"quant_method": "awq"}}})
    assert found is not None and found.label == "by AWQ"
    assert read_quantisation({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", "smollm2-135m-instruct"),
        ("unsloth/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("someone/smollm2-135m-instruct-GPTQ", "smollm2-135m-instruct"),
        ("someone/SmolLM2-135M-Instruct", "someone/SmolLM2-135M-Instruct"),
        ("unsloth/SmolLM2-360M-Instruct-bnb-4bit", "unsloth/SmolLM2-360M-Instruct-bnb-4bit"),
    ],
)
def test_an_adapter_of_a_quantised_copy_finds_its_base(
    named: str, base: str, expert_folder: Callable[..., Path]
) -> None:
    folder = expert_folder(1, base_model_name_or_path=named)
    ran = run_hub("add", folder, "--name", "mine", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["expert"]["base"] == base
    notes = [note for note in ran.lines("note:") if "not compared with" not in note]
    assert bool(notes) == (base == "smollm2-135m-instruct")
    assert all(named in note and base in note for note in notes)
