"""Names in files and names of modules: bases, adapters and task vectors under either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_LABEL, ROWS, Architecture, compute, make_adapters, measure_difference
from experthub import hub
from experthub.hub.bases.base import read
from experthub.hub.bases.names import Piece, join_pieces
from experthub.hub.errors import HubError
from safetensors.torch import load_file, save_file

EXACT = 1e-5  # of the largest output; float32 against float64
MIXTRAL, QWEN_MOE = BY_LABEL["Mixtral"], BY_LABEL["Qwen3-MoE, experts adapted"]
DEEPSEEK = BY_LABEL["DeepSeek-V3"]


def every(fast: set[str]) -> list[Any]:
    return [
        pytest.param(one, id=one.label, marks=() if one.label in fast else pytest.mark.slow)
        for one in ROWS
    ]


def merge(base: Path, *experts: Path | str, **options: Any) -> Any:
    method = {"method": "task_arithmetic", "scale": 1.0, **options}
    return hub.compose({"base": str(base), "experts": [*map(str, experts)], "merge": method})


def peft_adapter(one: Architecture, base: Path, folder: Path) -> torch.Tensor:
    """Write one adapter; return what peft computes with it."""
    from peft import PeftModel

    make_adapters(one, base, folder.parent)
    (folder.parent / "a").rename(folder)
    model = PeftModel.from_pretrained(one.load(base), folder).double().merge_and_unload()
    return compute(model, one.inputs())


def rename(folder: Path, change: Callable[[str], str], **config: Any) -> None:
    """Rename the tensors of an adapter."""
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({change(n): t for n, t in load_file(file).items()}, file)
    stated = json.loads(settings.read_text())
    leaves = sorted({n.split(".")[-3] for n in load_file(file)})
    settings.write_text(json.dumps(stated | {"target_modules": leaves, "r": 2} | config))


@pytest.mark.parametrize(
    "one", every({"GPT-2, as published", "Mixtral", "ViT classifier", "Qwen2.5-VL", "T5"})
)
def test_stored_tensors_make_the_parameters_that_transformers_loads(
    one: Architecture, tmp_path: Path
) -> None:
    base = read(one.save(tmp_path / "base"), "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    loaded = dict(one.load(tmp_path / "base").named_parameters(remove_duplicate=False))
    sources = base.names.find_sources(stored)
    assert list(base.shapes) == list(loaded)
    for name, parts in sources.items():
        found = join_pieces(((stored[s], piece) for s, piece in parts), base.shapes[name])
        assert torch.equal(found.double(), loaded[name]), name
    tied = {id(loaded[name]) for name in sources}
    assert all(id(loaded[name]) in tied for name in loaded.keys() - sources.keys())
    assert base.names == read(tmp_path / "base", "other").names  # from the cache


def test_pieces_may_be_permuted_transposed_and_stacked() -> None:
    """Rows in two runs, the second first, in one matrix of a stack that is stored as [I, O]."""
    stored = torch.arange(12.0).view(4, 3)
    piece = Piece("w", (4, 3), ((0, 1),), ((2, ((2, 0, 2), (0, 2, 2))), (1, ((0, 0, 3),))))
    found = join_pieces([(stored, piece)], (2, 3, 4))
    assert torch.equal(found[1], stored[[2, 3, 0, 1]].T)
    assert not found[0].any()
    assert piece.count == 12
    assert Piece.parse(json.loads(json.dumps(piece.record()))) == piece


OLDER = {
    "Qwen2.5-VL": lambda n: n.replace("model.language_model.", "model.").replace(
        "model.model.visual.", "model.visual."
    ),
    "Gemma 3 (multimodal)": lambda n: n.replace(
        "model.model.language_model.", "model.language_model.model."
    ).replace("model.model.vision_tower.", "model.vision_tower.vision_model."),
    "LLaVA": lambda n: n.replace(
        "model.model.language_model.", "model.language_model.model."
    ).replace("model.model.vision_tower.", "model.vision_tower.vision_model."),
    "ViT classifier": lambda n: (
        n.replace("vit.layers.", "vit.encoder.layer.")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
    ),
    "GPT-2, as published": lambda n: n.replace("model.transformer.", "model."),
    "Llama": lambda n: n.replace("model.model.", "model."),
    "BERT": lambda n: n.replace("base_model.model.", "base_model.model.bert."),
    "BERT classifier": lambda n: n.replace("model.bert.", "model."),
    "Mixtral": lambda n: n,
}


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(n, marks=() if n in ("Qwen2.5-VL", "Llama", "BERT") else pytest.mark.slow)
        for n in OLDER
    ],
)
def test_adapters_of_older_names_and_of_bare_models_are_the_same_expert(
    label: str, tmp_path: Path
) -> None:
    one = BY_LABEL[label]
    base = one.save(tmp_path / "base")
    right = peft_adapter(one, base, tmp_path / "new")
    own = merge(base, tmp_path / "new")
    assert measure_difference(own.model, right, one.inputs()) < EXACT
    (tmp_path / "new").rename(tmp_path / "old")
    if label != "Mixtral":
        before = sorted(load_file(tmp_path / "old/adapter_model.safetensors"))
        rename(tmp_path / "old", OLDER[label])
        assert before != sorted(load_file(tmp_path / "old/adapter_model.safetensors"))
    other = merge(base, tmp_path / "old")
    assert other.plan.parameters == own.plan.parameters
    for name in own.plan.parameters:
        assert torch.equal(own.model.get_parameter(name), other.model.get_parameter(name)), name


def older_mixture(one: Architecture, base: Path, folder: Path, half: bool = False) -> torch.Tensor:
    """A LoRA on every expert's linear module; return what the formula in the base's file gives."""
    file = base / "model.safetensors"
    state, tensors = load_file(file), {}
    random = torch.Generator().manual_seed(3)
    modules = [n.removesuffix(".weight") for n in state if ".experts." in n]
    for module in modules[:: 3 if half else 1]:
        outputs, inputs = state[f"{module}.weight"].shape
        a, b = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2, generator=random)
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a * 0.2, b * 0.2
        state[f"{module}.weight"] += 1.5 * 0.04 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({n.split(".")[-3] for n in tensors})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    right = folder.parent / "right"
    right.mkdir()
    save_file(state, right / "model.safetensors", metadata={"format": "pt"})
    (right / "config.json").write_bytes((base / "config.json").read_bytes())
    return compute(one.load(right), one.inputs())


@pytest.mark.parametrize("half", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("one", [MIXTRAL, QWEN_MOE, DEEPSEEK], ids=lambda one: one.label)
def test_loras_on_single_experts_change_their_parts_of_the_fused_weights(
    one: Architecture, half: bool, tmp_path: Path
) -> None:
    base = one.save(tmp_path / "base")
    right = older_mixture(one, base, tmp_path / "old", half)
    composition = merge(base, tmp_path / "old")
    assert measure_difference(composition.model, right, one.inputs()) < EXACT
    composition.save(tmp_path / "out")
    assert measure_difference(one.load(tmp_path / "out"), right, one.inputs()) < EXACT
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stored.keys()
    composition.save(tmp_path / "peft", format="peft")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(one.load(base), tmp_path / "peft").double()
    assert measure_difference(loaded.merge_and_unload(), right, one.inputs()) < EXACT


def test_a_route_over_fused_experts_is_refused_with_targets_that_work(tmp_path: Path) -> None:
    one = BY_LABEL["Mixtral, experts adapted"]
    base = one.save(tmp_path / "base")
    make_adapters(one, base, tmp_path)
    route = {"base": str(base), "experts": [str(tmp_path / "a")], "route": {"method": "uniform"}}
    with pytest.raises(HubError, match=r"0\.mlp\.experts\.down_proj is not the weight") as caught:
        hub.compose(route)
    targets = caught.value.hint.split("'")[1]
    routed = hub.compose(route | {"targets": targets})
    merged = hub.compose(
        {k: v for k, v in route.items() if k != "route"}
        | {"merge": {"method": "linear"}, "targets": targets}
    )
    right = compute(merged.model, one.inputs())
    assert measure_difference(routed.model, right, one.inputs()) < EXACT
    assert routed.plan.parameters == merged.plan.parameters
    older_mixture(one, base, tmp_path / "old")
    with pytest.raises(HubError, match="is not the weight") as caught:
        hub.compose(route | {"experts": [str(tmp_path / "old")]})
    assert caught.value.hint == "use merge: instead of route:"


@pytest.mark.parametrize("label", ["Mixtral", "GPT-2, as published", "Qwen2.5-VL"])
def test_differences_and_task_vectors_have_either_names(label: str, tmp_path: Path) -> None:
    one = BY_LABEL[label]
    base = one.save(tmp_path / "base")
    file = base / "model.safetensors"
    random = torch.Generator().manual_seed(4)
    changes = {n: torch.randn(t.shape, generator=random) * 0.05 for n, t in load_file(file).items()}
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for extra in base.glob("*.json"):
        (tuned / extra.name).write_bytes(extra.read_bytes())
    state = {n: t + changes[n] for n, t in load_file(file).items()}
    save_file(state, tuned / "model.safetensors", metadata={"format": "pt"})
    right = compute(one.load(tuned), one.inputs())
    made = hub.diff(str(base), str(tuned), "mine")
    assert made.figures["largest_deviation"] < 1e-6
    assert measure_difference(merge(base, "mine").model, right, one.inputs()) < EXACT
    # The same change under the names of the file, without some tensors.
    folder = tmp_path / "stored"
    folder.mkdir()
    kept = dict(sorted(changes.items())[::2])
    save_file(kept, folder / "task_vector.safetensors")
    save_file(
        {n: t + kept[n] if n in kept else t for n, t in load_file(file).items()},
        tuned / "model.safetensors",
        metadata={"format": "pt"},
    )
    right = compute(one.load(tuned), one.inputs())
    assert measure_difference(merge(base, folder).model, right, one.inputs()) < EXACT


def test_gates_go_with_the_names_of_their_adapter(tmp_path: Path) -> None:
    one = BY_LABEL["Llama"]
    base = one.save(tmp_path / "base")
    make_adapters(one, base, tmp_path)
    for name in ("a", "b"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        gates = {
            n.removeprefix("base_model.model.").replace(".lora_A.weight", ".gate"): t[0].clone()
            for n, t in tensors.items()
            if "lora_A" in n
        }
        save_file(gates, tmp_path / name / "phatgoose_gates.safetensors")
    recipe = {
        "base": str(base),
        "experts": [str(tmp_path / "a"), str(tmp_path / "b")],
        "route": {"method": "phatgoose", "top_k": 1},
    }
    right = compute(hub.compose(recipe).model, one.inputs())
    for name in ("a", "b"):
        rename(tmp_path / name, OLDER["Llama"])
        file = tmp_path / name / "phatgoose_gates.safetensors"
        save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file)
    assert torch.equal(compute(hub.compose(recipe).model, one.inputs()), right)


def test_names_that_transformers_would_not_load_are_refused(tmp_path: Path) -> None:
    one = BY_LABEL["Llama"]
    base = one.save(tmp_path / "base")
    make_adapters(one, base, tmp_path)
    rename(tmp_path / "a", lambda n: n.replace("self_attn", "attention"))
    with pytest.raises(HubError, match=r"adapts model\.layers\.0\.attention\.k_proj, which"):
        merge(base, tmp_path / "a")
    rename(tmp_path / "b", lambda n: n)  # Its target_modules are names without paths now.
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    twice = {n.replace("model.model.", "model."): t.clone() for n, t in tensors.items()}
    save_file(tensors | twice, file)
    with pytest.raises(HubError, match=r"changes model\.layers\.0\.\S+ of \S+ twice"):
        merge(base, tmp_path / "b")
