"""Compositions against their definitions: base + sum of w s B A, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, logits, tiny_llama
from experthub import hub
from experthub.hub.composition.assembly import _copy_model
from experthub.hub.errors import ConflictError, HubError, UsageError
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]


def expected_weights(model: Any, folders: list[Path], factors: list[float]) -> dict[str, Any]:
    """base + sum_e factor_e B_e A_e, in float64."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for folder, factor in zip(folders, factors, strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in tensors:
            if ".lora_A." in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")].double()
                state[f"{module}.weight"] = (
                    state[f"{module}.weight"] + factor * b @ tensors[name].double()
                )
    return state


@pytest.mark.parametrize(
    ("merge", "effective"),
    [
        ({"method": "linear"}, [1 / 6, 2 / 6, 3 / 6]),
        ({"method": "task_arithmetic"}, [0.3, 0.6, 0.9]),
        ({"method": "task_arithmetic", "scale": -1}, [-1.0, -2.0, -3.0]),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_merges_equal_their_definition(
    merge: dict[str, Any],
    effective: list[float],
    shared: bool,
    base_folder: Path,
    base_model: Any,
    expert_folder: Make,
) -> None:
    """Different ranks and targets; `lora_alpha / r` in the factor; a given model is not changed."""
    folders = [
        expert_folder(1, rank=2, lora_alpha=5, size=0.1),
        expert_folder(2, rank=4, targets=LINEARS[:3], lora_alpha=4, size=0.1),
        expert_folder(3, rank=3, targets=LINEARS[4:], lora_alpha=6, use_rslora=True, size=0.1),
    ]
    scales = [5 / 2, 4 / 4, 6 / 3**0.5]
    recipe = {
        "base": str(base_folder),
        "experts": [
            {"expert": str(f), "weight": w} for f, w in zip(folders, (1, 2, 3), strict=True)
        ],
        "merge": merge,
    }
    before = {n: t.clone() for n, t in base_model.state_dict().items()}
    composed = hub.compose(recipe, model=base_model if shared else None).model
    factors = [w * s for w, s in zip(effective, scales, strict=True)]
    expected = expected_weights(base_model, folders, factors)
    for name, tensor in composed.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-6)
    for name, tensor in base_model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_uniform_equals_linear_with_mixed_targets(base_folder: Path, expert_folder: Make) -> None:
    folders = [expert_folder(1), expert_folder(2, rank=2, targets=LINEARS[:2])]
    common = {"base": str(base_folder), "experts": [str(f) for f in folders]}
    merged = hub.compose({**common, "merge": {"method": "linear"}}).model
    routed = hub.compose({**common, "route": {"method": "uniform"}}).model
    torch.testing.assert_close(logits(routed), logits(merged), atol=1e-3, rtol=1e-4)


def test_combine_parameters_mixes_the_factors(base_folder: Path, expert_folder: Make) -> None:
    """(sum w s B)(sum w A), which is not the sum of the products, and needs one rank."""
    folders = [expert_folder(1, targets=("q_proj",)), expert_folder(2, targets=("q_proj",))]
    common = {"base": str(base_folder), "experts": [str(f) for f in folders]}
    route = {"method": "uniform", "combine": "parameters"}
    composed = hub.compose({**common, "route": route}).model
    name = "model.layers.1.self_attn.q_proj"
    stored = [load_file(f / "adapter_model.safetensors") for f in folders]
    a = sum(t[f"base_model.model.{name}.lora_A.weight"] for t in stored) / 2
    b = sum(2 * t[f"base_model.model.{name}.lora_B.weight"] for t in stored) / 2
    module = composed.get_submodule(name)
    x = torch.randn(3, 4, 32)
    expected = x @ module.weight.T + x @ a.T @ b.T
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    unequal = [str(folders[0]), str(expert_folder(3, rank=2, targets=("q_proj",)))]
    with pytest.raises(HubError, match="one rank"):
        hub.compose({**common, "experts": unequal, "route": route})


def test_saved_model_has_the_same_logits(
    tmp_path: Path, base_folder: Path, expert_folder: Make
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = {
        "base": str(base_folder),
        "experts": [str(expert_folder(1)), str(expert_folder(2, rank=2))],
        "merge": {"method": "task_arithmetic"},
    }
    composition = hub.compose(recipe)
    composition.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(composition.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]
    with pytest.raises(ConflictError):
        composition.save(tmp_path / "out")


def test_saved_adapter_has_the_same_logits_in_peft(
    tmp_path: Path, base_folder: Path, base_model: Any, expert_folder: Make
) -> None:
    from peft import PeftModel

    recipe = {
        "base": str(base_folder),
        "experts": [str(expert_folder(1)), str(expert_folder(2, rank=2, targets=LINEARS[:3]))],
        "merge": {"method": "linear"},
    }
    composition = hub.compose(recipe)
    composition.save(tmp_path / "out", format="peft")
    adapted = PeftModel.from_pretrained(base_model, str(tmp_path / "out"))
    torch.testing.assert_close(logits(adapted), logits(composition.model), atol=1e-3, rtol=1e-4)


def test_routed_model_generates_and_is_frozen(base_folder: Path, expert_folder: Make) -> None:
    recipe = {
        "base": str(base_folder),
        "experts": [str(expert_folder(1)), str(expert_folder(2))],
        "route": {"method": "phatgoose"},
    }
    composition = hub.compose(recipe)
    assert not any(p.requires_grad for p in composition.model.parameters())
    out = composition.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    assert out.shape[1] > 3
    with pytest.raises(UsageError):
        composition.save("out")


def test_targets_limit_what_changes(
    base_folder: Path, base_model: Any, expert_folder: Make
) -> None:
    recipe = {
        "base": str(base_folder),
        "experts": [str(expert_folder(1))],
        "merge": {"method": "linear"},
        "targets": r".*layers\.1\..*q_proj",
    }
    composed = hub.compose(recipe).model.state_dict()
    changed = {n for n, t in base_model.state_dict().items() if not torch.equal(t, composed[n])}
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}


def test_weight_of_a_routed_expert_scales_its_delta(
    base_folder: Path, base_model: Any, expert_folder: Make
) -> None:
    folder = str(expert_folder(1))
    routed = hub.compose(
        {
            "base": str(base_folder),
            "experts": [{"expert": folder, "weight": 0.25}],
            "route": {"method": "phatgoose"},
        }
    ).model
    expected = expected_weights(base_model, [Path(folder)], [0.25 * 2])
    base_model.load_state_dict({n: t.float() for n, t in expected.items()})
    torch.testing.assert_close(logits(routed), logits(base_model), atol=1e-3, rtol=1e-4)


def test_dtype_of_the_composition(base_folder: Path, expert_folder: Make) -> None:
    """In bfloat16 the sum is taken in float32 and rounded once; routing scores stay float32."""
    folder = expert_folder(1, size=0.1)
    recipe = {"base": str(base_folder), "experts": [str(folder)], "dtype": "bfloat16"}
    exact = hub.compose({**recipe, "dtype": "float32", "merge": {"method": "linear"}}).model
    merged = hub.compose({**recipe, "merge": {"method": "linear"}}).model
    name = "model.layers.0.mlp.up_proj.weight"
    # The base is float32 on disk and is rounded to bfloat16 before the sum: two roundings.
    torch.testing.assert_close(
        merged.get_parameter(name).float(), exact.get_parameter(name), atol=2e-2, rtol=2e-2
    )
    routed = hub.compose({**recipe, "route": {"method": "phatgoose"}}).model
    assert logits(routed).dtype == torch.bfloat16
    assert (
        routed.get_submodule("model.layers.0.mlp.up_proj").group.packed.probes.dtype
        == torch.float32
    )


def test_a_loaded_base_may_be_on_any_device_of_the_named_type(
    base_folder: Path, expert_folder: Make
) -> None:
    """The device cuda means cuda:0, too."""
    experts = [str(expert_folder(1))]
    recipe = {"base": str(base_folder), "experts": experts, "merge": {"method": "linear"}}
    model = hub.compose(recipe).model
    for device in ("cpu", "cpu:0"):
        hub.compose(recipe, model=model, device=device)
    for device in ("meta", "cpu:1"):
        with pytest.raises(UsageError, match=f"needs float32 on {device}"):
            hub.compose(recipe, model=model, device=device)

    class Elsewhere(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cuda", 0)

    for device in (None, "cuda", "cuda:0"):
        assert isinstance(_copy_model(Elsewhere(), "float32", device), Elsewhere)
    for device in ("cuda:1", "cpu"):
        with pytest.raises(UsageError, match=f"needs float32 on {device}"):
            _copy_model(Elsewhere(), "float32", device)


def test_nested_merge_with_and_without_rank(base_folder: Path, expert_folder: Make) -> None:
    a, b, c = (str(expert_folder(e, rank=2)) for e in (1, 2, 3))
    nested: dict[str, Any] = {"merge": {"method": "linear"}, "experts": [a, b]}
    flat = hub.compose(
        {
            "base": str(base_folder),
            "merge": {"method": "task_arithmetic", "scale": 1},
            "experts": [{"expert": a, "weight": 0.5}, {"expert": b, "weight": 0.5}, c],
        }
    ).model
    for rank in (None, 4, 9):
        group = nested | ({"rank": rank} if rank else {})
        deep = hub.compose(
            {
                "base": str(base_folder),
                "experts": [group, c],
                "merge": {"method": "task_arithmetic", "scale": 1},
            }
        ).model
        torch.testing.assert_close(logits(deep), logits(flat), atol=1e-3, rtol=1e-4)
    routed = hub.compose(
        {
            "base": str(base_folder),
            "experts": [nested | {"rank": 3}, c],
            "route": {"method": "phatgoose", "top_k": 2},
        }
    )
    assert [e.label for e in routed.plan.experts][1] == Path(c).name


def test_lora_on_tied_embeddings_changes_one_use_only(
    tmp_path: Path, base_folder: Path, expert_folder: Make
) -> None:
    """A LoRA on lm_head leaves the input embeddings, and the other way round, as in peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for targets in (["lm_head"], ["embed_tokens"], ["embed_tokens", "q_proj"]):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=4, target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "-".join(targets)
        adapted.eval().save_pretrained(folder, save_embedding_layers=False)
        recipe = {"base": str(base_folder), "experts": [str(folder)], "merge": {"method": "linear"}}
        composition = hub.compose(recipe)
        torch.testing.assert_close(logits(composition.model), logits(adapted), atol=1e-3, rtol=1e-4)
        composition.save(folder / "out")
        again = AutoModelForCausalLM.from_pretrained(folder / "out")
        assert torch.equal(logits(again), logits(composition.model))
        assert not again.config.tie_word_embeddings


def test_conv1d_models_compose_like_peft(tmp_path: Path) -> None:
    """GPT-2 stores its linears transposed: merged and routed, the function is peft's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    lora = LoraConfig(r=3, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    adapted = get_peft_model(model, lora).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "expert")
    common = {"base": str(tmp_path / "gpt2"), "experts": [str(tmp_path / "expert")]}
    expected = logits(adapted)
    for way in ({"merge": {"method": "linear"}}, {"route": {"method": "uniform"}}):
        composed = hub.compose({**common, **way}).model
        torch.testing.assert_close(logits(composed), expected, atol=1e-4, rtol=1e-4)


def test_dense_task_vector_merges(tmp_path: Path, base_folder: Path, base_model: Any) -> None:
    folder = tmp_path / "vector"
    folder.mkdir()
    name, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    change = {n: torch.randn_like(base_model.get_parameter(n)) for n in (name, norm)}
    save_file(change, folder / "task_vector.safetensors")
    common = {"base": str(base_folder), "experts": [str(folder)]}
    composed = hub.compose({**common, "merge": {"method": "task_arithmetic", "scale": 0.5}}).model
    for n, d in change.items():
        expected = base_model.get_parameter(n) + 0.5 * d
        torch.testing.assert_close(composed.get_parameter(n), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(UsageError, match="dense") as found:
        hub.compose({**common, "route": {"method": "uniform"}})
    assert "hub diff --rank" in (found.value.hint or "")


def test_another_base_is_refused_unless_allowed(
    tmp_path: Path, base_folder: Path, expert_folder: Make
) -> None:
    from experthub.hub.registry.expert import Expert
    from experthub.hub.store.folder import read_folder
    from experthub.hub.transfer.describe import write_description

    folder = expert_folder(1)
    identity = read_folder(folder).model_copy(update={"base_fingerprint": "sha256:" + "0" * 64})
    expert = Expert(name="x", base="b", sources=["file:x"], digest=identity.digest)
    write_description(folder, expert, identity)
    recipe = {"base": str(base_folder), "experts": [str(folder)], "merge": {"method": "linear"}}
    with pytest.raises(HubError) as caught:
        hub.compose(recipe)
    assert caught.value.code == 3
    hub.compose({**recipe, "allow_base_mismatch": True})
    other = tiny_llama(tmp_path / "other", hidden_size=48)
    with pytest.raises(HubError, match="changes"):
        hub.compose({**recipe, "base": str(other), "allow_base_mismatch": True})
