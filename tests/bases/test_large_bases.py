"""Bases that are larger than memory: merges are written tensor by tensor, routes are offloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ROWS, Architecture, make_adapters
from conftest import make_expert, run_hub, tiny_bert, tiny_llama
from experthub import hub
from experthub.hub.bases import loading
from experthub.hub.composition import streaming
from experthub.hub.composition.compose import write_model
from experthub.hub.errors import UsageError
from experthub.hub.files import yaml_files
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from safetensors.torch import load_file

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "density": 0.5},
    "dare": {"method": "dare", "density": 0.5},
}


def gemma(folder: Path) -> Path:
    tiny_llama(folder)
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def untied(folder: Path) -> Path:
    return tiny_llama(folder, tied=False)


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


BASES = {
    "tied": (tiny_llama, ("q_proj", "down_proj")),
    "untied": (untied, ("q_proj", "down_proj")),
    "gemma": (gemma, ("o_proj", "gate_proj")),
    "bert": (tiny_bert, ("query", "dense")),
    "t5": (t5, ("SelfAttention.q", "wo")),
}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def compare(plan: Any, out: Path) -> None:
    """Compare a streamed folder with the one that `Composition.save` writes, file by file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experthub.hub.composition.compose.assemble", None)
        write_model(plan, out, "hf", Session())
    hub.compose(plan).save(out.with_name("expected"))
    ours, expected = read_weights(out), read_weights(out.with_name("expected"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    names = {p.name for p in out.with_name("expected").iterdir()}
    assert {p.name for p in out.iterdir() if not p.name.startswith("model")} == {
        name for name in names if not name.startswith("model")
    }
    for name in names & {"config.json", "generation_config.json", "recipe.lock.yaml"}:
        assert (out / name).read_bytes() == (out.with_name("expected") / name).read_bytes(), name


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_merge_has_the_bits_of_one_in_memory(
    case: str, dtype: str, tmp_path: Path
) -> None:
    make, targets = BASES[case]
    base = make(tmp_path / "base")
    experts = [
        str(make_expert(tmp_path / f"expert-{e}", base, e, targets=targets, gates=False, size=0.2))
        for e in (1, 2)
    ]
    recipe = {"base": str(base), "experts": experts, "dtype": dtype}
    plan = resolve(Recipe.of(recipe | {"merge": {"method": "linear"}}))
    compare(plan, tmp_path / "out")


FAST = ("GPT-2, as published", "Mixtral, experts adapted", "Qwen2.5-VL")


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=one.label, marks=() if one.label in FAST else pytest.mark.slow)
        for one in ROWS
    ],
)
def test_tensors_that_transformers_renames_and_fuses_have_the_bits_too(
    one: Architecture, tmp_path: Path
) -> None:
    base = one.save(tmp_path / "base")
    make_adapters(one, base, tmp_path)
    experts = [str(tmp_path / "a"), str(tmp_path / "b")]
    recipe = {"base": str(base), "experts": experts, "merge": {"method": "ties", "density": 0.5}}
    compare(resolve(Recipe.of(recipe)), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_every_merge_can_be_streamed(method: str, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    experts = [str(make_expert(tmp_path / f"expert-{e}", base, e)) for e in (1, 2)]
    recipe = {"base": str(base), "experts": experts, "merge": METHODS[method]}
    compare(resolve(Recipe.of(recipe)), tmp_path / "out")


def test_a_large_model_is_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    expert = str(make_expert(tmp_path / "expert", base, 1))
    recipe = {"base": str(base), "experts": [expert], "merge": {"method": "linear"}}
    plan, out = resolve(Recipe.of(recipe)), tmp_path / "out"
    monkeypatch.setattr(streaming, "MAX_SHARD", 20_000)
    write_model(plan, out, "hf", Session())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = transformers.LlamaForCausalLM.from_pretrained(out)
    expected = hub.compose(plan).model
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_an_adapted_embedding_is_merged_in_memory(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    expert = make_expert(tmp_path / "expert", base, 1, targets=("q_proj", "lm_head"), gates=False)
    recipe = {"base": str(base), "experts": [str(expert)], "merge": {"method": "linear"}}
    Path("recipe.yaml").write_text(yaml_files.dump(recipe))
    ran = run_hub("compose", "recipe.yaml", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(found.lm_head.weight, hub.compose("recipe.yaml").model.lm_head.weight)


MEASURE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from experthub.hub.composition.compose import write_model
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
plan = resolve(Recipe.read(sys.argv[1]))
write_model(plan, Path(sys.argv[2]), "hf", Session())
# Not ru_maxrss, which a new process inherits from the one that started it.
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_a_streamed_merge_needs_far_less_memory_than_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
    settings = sizes | {"num_attention_heads": 8, "num_key_value_heads": 8}
    base = tiny_llama(tmp_path / "base", **settings)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert size > 1e9
    expert = make_expert(tmp_path / "expert", base, 1, targets=("q_proj",), gates=False, size=0.01)
    recipe = {"base": str(base), "experts": [str(expert)], "merge": {"method": "linear"}}
    Path("recipe.yaml").write_text(yaml_files.dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "recipe.yaml", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = 1024 * int(done.stdout.split()[-1])
    # Python, torch and transformers alone need most of it.
    assert peak < 0.5 * size, (peak, size)


def test_a_route_runs_on_a_base_that_is_offloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights stay on the disk until their module is called; the logits are the same."""
    base = tiny_llama(tmp_path / "base", tied=False)
    experts = [str(make_expert(tmp_path / f"expert-{e}", base, e)) for e in (1, 2)]
    recipe: dict[str, Any] = {"base": str(base), "experts": experts}
    routed = recipe | {"route": {"method": "phatgoose"}}
    expected = hub.compose(routed).model
    limited = partial(loading.build_model, max_memory={"cpu": 60_000})
    monkeypatch.setattr(loading, "build_model", limited)
    composition = hub.compose(routed, device="auto")
    devices = {parameter.device.type for parameter in composition.model.parameters()}
    assert "meta" in devices
    ids = torch.tensor([[5, 77, 130, 9, 200, 33, 41]])
    with torch.no_grad():
        found, wanted = composition.model(input_ids=ids).logits, expected(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="--device auto may leave on the disk"):
        hub.compose(recipe | {"merge": {"method": "linear"}}, device="auto")
