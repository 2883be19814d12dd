"""`hub train lora --targets`: the layers that are trained, and those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import BY_LABEL, compute, measure_difference
from experthub import hub
from experthub.hub.errors import UsageError
from safetensors.torch import load_file

SHORT = hub.Settings(steps=2, batch_size=4, examples=8, lr=1e-2)


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return BY_LABEL[request.param].save(tmp_path / "base")


def train(base: Path, task: str, **options: Any) -> tuple[Path, set[str]]:
    """Train a LoRA; return its folder and the modules that it adapts."""
    made = hub.train_lora(str(base), task, "made", SHORT, **options)
    folder = Path(made.sources[0].removeprefix("file:"))
    tensors = load_file(folder / "adapter_model.safetensors")
    return folder, {n.split(".lora_")[0].removeprefix("base_model.model.") for n in tensors}


@pytest.mark.parametrize("base", ["Llama"], indirect=True)
@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("q_proj,mlp.up_proj", {f"{n}.{i}" for n in ("q", "up") for i in (0, 1)}),
        ("q_proj, up_proj ", {f"{n}.{i}" for n in ("q", "up") for i in (0, 1)}),
        (r".*\.1\.self_attn\.[qk]_proj", {"q.1", "k.1"}),
    ],
    ids=["names", "names with spaces", "expression"],
)
def test_only_the_chosen_layers_are_trained(
    base: Path, targets: str, wanted: set[str], tiny_task: str
) -> None:
    folder, modules = train(base, tiny_task, targets=targets)
    assert {f"{m.split('.')[-1][:-5]}.{m.split('.')[2]}" for m in modules} == wanted
    assert json.loads((folder.parent / "run.json").read_text())["targets"] == targets
    everywhere, modules = train(base, tiny_task)
    assert "targets" not in json.loads((everywhere.parent / "run.json").read_text())
    assert len(modules) == 14


@pytest.mark.parametrize("base", ["Mixtral"], indirect=True)
def test_the_experts_of_a_mixture_are_trained_as_peft_does(base: Path, tiny_task: str) -> None:
    from peft import PeftModel

    one = BY_LABEL["Mixtral"]
    folder, modules = train(base, tiny_task, targets="q_proj,down_proj,gate_up_proj")
    assert "model.layers.0.mlp.experts.base_layer" in modules
    loaded = PeftModel.from_pretrained(one.load(base), folder).double().merge_and_unload()
    recipe = {"base": str(base), "experts": ["made"], "merge": {"method": "linear"}}
    right = compute(loaded, one.inputs())
    assert measure_difference(hub.compose(recipe).model, right, one.inputs()) < 1e-5
    assert measure_difference(one.load(base), right, one.inputs()) > 1e-4


@pytest.mark.parametrize("base", ["Mamba"], indirect=True)
def test_layers_that_peft_refuses_are_left_out(base: Path, tiny_task: str) -> None:
    _, modules = train(base, tiny_task)
    assert {m.split(".")[-1] for m in modules} == {"in_proj", "x_proj", "dt_proj"}
    with pytest.raises(UsageError, match=r"matches no linear module of .* that can be trained"):
        train(base, tiny_task, targets="out_proj")


@pytest.mark.parametrize("base", ["Llama"], indirect=True)
@pytest.mark.parametrize(
    ("targets", "error"),
    [
        ("query", "'query' matches no linear module"),
        ("q_proj,v_prj", "'v_prj' matches no linear module"),
        ("(", r"'\(' is not a regular expression"),
        ("embed_tokens", "'embed_tokens' matches no linear module"),
    ],
)
def test_targets_that_select_nothing_are_refused(
    base: Path, targets: str, error: str, tiny_task: str
) -> None:
    with pytest.raises(UsageError, match=error):
        train(base, tiny_task, targets=targets)
