"""The proof at `hub add`: the composed expert against peft, on the expert's own base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import run_hub
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.proofs import inputs, proof
from experthub.hub.registry.expert import Expert
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from peft_models import MODELS, make_adapter, make_base
from safetensors.torch import load_file, save_file

TARGETS = {
    "bert": ["query"],
    "roberta": ["query"],
    "modernbert": ["Wqkv"],
    "gpt2": ["c_attn"],
    "t5": ["q"],
}


def write(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """Write a base and an adapter of it."""
    base, one = tmp_path / "base", tmp_path / "one"
    config = {"fan_in_fan_out": True} if name == "gpt2" else {}
    kind = make_base(base, name)
    make_adapter(kind, base, one, target_modules=TARGETS.get(name, ["q_proj"]), **config)
    return base, one


@pytest.mark.parametrize("name", MODELS)
def test_an_added_expert_is_compared_with_peft(name: str, tmp_path: Path) -> None:
    base, one = write(tmp_path, name)
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 0, found.err
    assert found.out == "mine@1\n"
    assert found.lines("equal to peft"), found.err
    kept = find_mine().proof
    assert kept is not None
    assert kept.against.startswith("peft ")
    assert kept.dtype == "float32"
    assert 0 <= kept.max_difference < 5e-5
    shown = run_hub("show", "mine")
    assert f"max_difference {kept.max_difference}" in shown.out
    assert run_hub("show", "mine", "--json").json["expert"]["proof"]["dtype"] == "float32"


def find_mine() -> Expert:
    """Return the entry of the expert that the test added."""
    return next(e for e in Registry.read().list_experts() if e.name == "mine")


def test_the_proof_can_be_skipped(tmp_path: Path) -> None:
    base, one = write(tmp_path, "llama")
    found = run_hub("add", one, "--name", "mine", "--base", base, "--no-proof")
    assert found.code == 0
    assert find_mine().proof is None


def test_without_the_base_there_is_a_note_and_an_error_on_request(tmp_path: Path) -> None:
    _, one = write(tmp_path, "llama")
    asked = run_hub("add", one, "--name", "mine", "--base", "elsewhere", "--proof")
    assert asked.code == 1
    assert "elsewhere is not on this machine" in asked.err
    found = run_hub("add", one, "--name", "mine", "--base", "elsewhere")
    assert found.code == 0
    assert "elsewhere is not on this machine" in found.err
    assert find_mine().proof is None


def test_a_large_base_is_compared_on_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "LARGEST_BASE", 1000)
    base, one = write(tmp_path, "llama")
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 0
    assert "pass --proof" in found.err
    assert find_mine().proof is None
    asked = run_hub("add", one, "--name", "mine", "--base", base, "--proof")
    assert asked.lines("equal to peft")
    assert asked.out == "mine@1\n" and find_mine().proof is not None


def test_a_registered_expert_that_fails_a_later_proof_stays_without_one(tmp_path: Path) -> None:
    _, one = write(tmp_path, "llama")
    (tmp_path / "bert").mkdir()
    other, _ = write(tmp_path / "bert", "bert")
    options = ("--name", "mine", "--base", other)
    assert run_hub("add", one, *options, "--no-proof").code == 0
    asked = run_hub("add", one, *options, "--proof")
    assert asked.code == 1 and "does not have" in asked.err
    assert find_mine().proof is None


def test_a_misspelt_base_is_named_in_the_note(tmp_path: Path) -> None:
    base, one = write(tmp_path, "llama")
    assert run_hub("base", "add", "my-llama", base).code == 0
    found = run_hub("add", one, "--name", "mine", "--base", "my-lama")
    assert found.code == 0 and "did you mean 'my-llama'?" in found.err


def test_an_expert_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one = write(tmp_path, "llama")
    load = proof.load_with_peft

    def load_changed(folder: Path) -> proof.SourceLibrary:
        def change(model: Any) -> Any:
            made = load(folder).load(model)
            with torch.no_grad():
                next(p for n, p in made.named_parameters() if "lora_B" in n).mul_(1.1)
            return made

        return proof.SourceLibrary("peft", change, load(folder).merge)

    monkeypatch.setattr(proof, "load_with_peft", load_changed)
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 3
    assert "its outputs differ by" in found.err
    assert not [e for e in Registry.read().list_experts() if e.name == "mine"]


def write_for_all_linears(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """Write a base and an adapter of all its linear modules, with weights that matter."""
    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path / "base")
    random, tensors = torch.Generator().manual_seed(0), {}
    for module, linear in model.named_modules():
        if type(linear) is torch.nn.Linear and module != "lm_head":
            outputs, inputs = linear.weight.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, inputs, generator=random) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 3, generator=random) * 0.2
    one = tmp_path / "one"
    one.mkdir()
    save_file(tensors, one / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
    (one / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none"}))
    return tmp_path / "base", one


def test_an_adapter_that_peft_loads_in_part_is_not_refused(tmp_path: Path) -> None:
    """Peft loads no dense and no shared layers of DeepSeek-V3 if all linears are adapted."""
    base, one = write_for_all_linears(tmp_path, "deepseek_v3")
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 0, found.err
    (note,) = found.lines("note:")  # No module that the base lacks is reported as missing.
    assert (
        "leaves 12 tensors of the adapter out (first: base_model.model.model.layers.0.mlp" in note
    )
    assert find_mine().proof is None
    asked = run_hub("add", one, "--name", "other", "--base", base, "--proof")
    assert asked.code == 1
    assert "leaves 12 tensors of the adapter out" in asked.err


def test_weights_that_are_read_without_a_call_are_compared_merged(tmp_path: Path) -> None:
    """The adapter of peft beside `dt_proj` has no effect, because the model reads its weight."""
    base, one = write_for_all_linears(tmp_path, "jamba")
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 0, found.err
    kept = find_mine().proof
    assert kept is not None
    assert kept.against.endswith(" (merged)")
    assert not found.lines("note:"), found.err
    assert kept.max_difference < 5e-5


def test_only_modules_of_the_base_are_reported_as_missing(tmp_path: Path) -> None:
    base, one = write_for_all_linears(tmp_path, "lfm2")
    file, name = one / "adapter_model.safetensors", "model.layers.1.self_attn.v_proj"
    kept = {n: t for n, t in load_file(file).items() if name not in n}
    save_file(kept, file)
    config = json.loads((one / "adapter_config.json").read_text())
    targets = {path.rpartition(".lora_")[0].rpartition(".")[2] for path in kept}
    targets = sorted(targets | {"v_proj", "elsewhere"})
    (one / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    found = run_hub("add", one, "--name", "mine", "--base", base, "--no-proof")
    assert found.code == 0, found.err
    (note,) = found.lines("note:")
    assert f"it has no weights for {name}, which" in note


def test_an_expert_that_does_not_fit_its_base_is_refused(tmp_path: Path) -> None:
    base, one = write(tmp_path, "llama")
    make_base(tmp_path / "other", "qwen2")
    file = one / "adapter_model.safetensors"
    weights = {n: torch.cat([t, t], -1) if "lora_A" in n else t for n, t in load_file(file).items()}
    save_file(weights, file)
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 1
    assert "--no-proof" in found.err
    assert run_hub("add", one, "--name", "mine", "--base", base, "--no-proof").code == 0


def test_a_library_that_cannot_run_the_expert_is_a_note(tmp_path: Path) -> None:
    base, one = write(tmp_path, "llama")
    run_hub("add", one, "--name", "mine", "--base", base, "--no-proof")

    def fail(model: Any) -> Any:
        raise RuntimeError("no such kernel")

    notes: list[str] = []
    session = Session(report=lambda what, done, size: notes.append(what))
    reference = proof.SourceLibrary("other 1.0", fail)
    assert proof.prove(find_mine(), reference, session) is None
    assert "no such kernel" in notes[-1]
    with pytest.raises(HubError, match="no such kernel"):
        proof.prove(find_mine(), reference, session, requested=True)


def test_the_proof_of_somebody_else_is_not_kept(tmp_path: Path) -> None:
    base, one = write(tmp_path, "llama")
    run_hub("add", one, "--name", "mine", "--base", base)
    assert run_hub("push", "mine", f"file:{tmp_path / 'shared'}").code == 0
    for file in (tmp_path / "shared").rglob("expert.json"):
        assert "proof" not in file.read_text()


def test_outputs_without_a_common_name_or_shape_are_different() -> None:
    one = {"logits": torch.ones(2)}
    for other in ({}, {"logits": torch.ones(3)}, {"logits": torch.full((2,), torch.nan)}):
        difference, largest = inputs.compare_outputs(one, other)
        with pytest.raises(IntegrityError):
            entry = Expert(name="x", base="b", sources=["./x"], digest="sha256:" + "0" * 64)
            proof._judge(entry, proof.SourceLibrary("other", lambda m: m), difference, largest)
