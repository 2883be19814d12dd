"""`hub add` and `hub pull` of adapters that other programs wrote, and notes about configurations."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from experthub import hub
from experthub.cli.main import app
from experthub.hub.errors import ConflictError, HubError, IntegrityError
from experthub.hub.files.digests import sha256_of
from experthub.hub.formats.lora_config import REFUSED, check_config
from experthub.hub.session import Session
from experthub.hub.transfer.adding import add_expert
from experthub.hub.transfer.pull_by_name import pull_by_name
from peft_kinds import make_adapter, make_base
from safetensors.torch import load_file, save_file
from wild_adapters import write_mlx, write_peft, write_pickle

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logging.disable(logging.WARNING)
    yield make_base("llama", tmp_path_factory.mktemp("base") / "m")
    logging.disable(logging.NOTSET)


def notes_of(place: Path, name: str, **options: Any) -> tuple[Any, list[str]]:
    """Add an expert, and collect the notes that a user sees."""
    seen: list[str] = []

    def report(text: str, done: int, of: int) -> None:
        if text.startswith("note: "):
            seen.append(text)

    return add_expert(place, name, Session(report=report), **options), seen


def test_the_entry_states_what_the_expert_was_made_from(llama: Path, tmp_path: Path) -> None:
    make_adapter("DoRA", llama, tmp_path / "a", "llama")
    expert, notes = notes_of(tmp_path / "a", "mine")
    assert expert.kind == "task_vector" and expert.base == str(llama)
    assert expert.made_from["type"] == "DoRA" and expert.made_from["format"] == "peft"
    assert expert.made_from["sha256"] == sha256_of(tmp_path / "a" / ADAPTER)
    assert any("converted" in note and "DoRA" in note for note in notes)
    (kept,) = (one for one in Session().registry.list_experts() if one.name == "mine")
    assert kept.made_from == expert.made_from
    recipe = {"base": str(llama), "experts": ["mine"], "merge": {"method": "linear"}}
    assert hub.compose(recipe).plan.digest


def test_what_was_not_converted_has_no_such_record(llama: Path, tmp_path: Path) -> None:
    expert, notes = notes_of(write_peft(llama, tmp_path / "a"), "mine")
    assert expert.made_from == {} and notes == []
    assert "made_from" not in (Path(tmp_path) / "home/registry/mine/1.yaml").read_text()


def test_a_converted_expert_is_pulled_again_from_its_source(llama: Path, tmp_path: Path) -> None:
    expert, _ = notes_of(write_mlx(llama, tmp_path / "a", 0), "mine")
    shutil.rmtree(tmp_path / "home" / "objects")
    assert pull_by_name("mine", Session())[0].digest == expert.digest


def test_pull_converts_a_folder(llama: Path, tmp_path: Path) -> None:
    write_mlx(llama, tmp_path / "a", 0)
    (expert,) = pull_by_name(f"file:{tmp_path / 'a'}", Session(), as_name="mine")
    assert expert.kind == "lora" and expert.made_from["format"] == "MLX"


def test_a_recipe_may_name_such_a_folder(llama: Path, tmp_path: Path) -> None:
    write_mlx(llama, tmp_path / "a", 0)
    recipe = {
        "base": str(llama),
        "experts": [str(tmp_path / "a")],
        "merge": {"method": "linear"},
    }
    assert len(hub.compose(recipe).plan.experts) == 1


def test_a_pickle_is_refused_without_the_explicit_command(llama: Path, tmp_path: Path) -> None:
    write_pickle(llama, tmp_path / "a", 0)
    with pytest.raises(IntegrityError, match="a pickle, and no safetensors") as caught:
        add_expert(tmp_path / "a", "mine", Session())
    assert "hub convert" in caught.value.hint


@pytest.mark.parametrize("name", [ADAPTER, "x.safetensors"])
def test_a_file_may_be_named(name: str, llama: Path, tmp_path: Path) -> None:
    folder = write_peft(llama, tmp_path / "a")
    (folder / ADAPTER).rename(folder / name)
    expert, _ = notes_of(folder / name, "mine")
    assert expert.kind == "lora"


UNSET = [None, False, "", [], {}]


@pytest.mark.parametrize("value", UNSET)
def test_unknown_keys_that_are_not_used_are_ignored_with_a_note(
    value: Any, llama: Path, tmp_path: Path
) -> None:
    _, notes = notes_of(write_peft(llama, tmp_path / "a", future_key=value), "mine")
    assert len(notes) == 1 and "ignored the unused keys future_key" in notes[0]


@pytest.mark.parametrize("value", [0, 1, True, "x", [0], {"a": None}])
def test_unknown_keys_that_are_used_are_refused(value: Any) -> None:
    config = {"peft_type": "LORA", "future_key": value, "peft_version": "0.99.1"}
    with pytest.raises(IntegrityError, match=r"saved by peft 0\.99\.1, newer than this hub knows"):
        check_config(config)
    with pytest.raises(IntegrityError, match=r"unknown key 'future_key' in its configuration$"):
        check_config(config | {"peft_version": "0.20.0"})


@pytest.mark.parametrize("key", REFUSED)
def test_every_refused_key_has_a_reason_and_a_way_out(key: str) -> None:
    harmless, reason, _ = REFUSED[key]
    for value in harmless:
        check_config({"peft_type": "LORA", key: value})
    with pytest.raises(IntegrityError) as caught:
        check_config({"peft_type": "LORA", key: ["x"]})
    assert key in caught.value.message and reason in caught.value.message
    assert caught.value.hint and "{" not in caught.value.hint


def test_old_keys_of_peft_are_taken() -> None:
    check_config({"peft_type": "LORA", "enable_lora": None, "merge_weights": False})
    with pytest.raises(IntegrityError, match="parts of a fused module"):
        check_config({"peft_type": "LORA", "enable_lora": [True, False, True]})


@pytest.mark.parametrize(
    "word", ["eva", "EVA", "mica", "gaussian", "orthogonal", True, False, None]
)
def test_initialisations_that_leave_the_base_alone_are_plain(word: Any) -> None:
    check_config({"peft_type": "LORA", "init_lora_weights": word})


@pytest.mark.parametrize("with_base", [True, False])
def test_modules_without_weights_are_named(with_base: bool, llama: Path, tmp_path: Path) -> None:
    folder = write_peft(llama, tmp_path / "a", target_modules=["q_proj", "down_proj", "v_proj"])
    kept = {n: t for n, t in load_file(folder / ADAPTER).items() if "layers.1.mlp" not in n}
    save_file(kept, folder / ADAPTER)
    named = {} if with_base else {"base_model_name_or_path": "org/away"}
    config = json.loads((folder / CONFIG).read_text()) | named
    (folder / CONFIG).write_text(json.dumps(config))
    _, notes = notes_of(folder, "mine")
    assert len(notes) == 1 and "model.layers.1.mlp.down_proj" in notes[0] and "v_proj" in notes[0]
    assert ("model.layers.0.self_attn.v_proj" in notes[0]) == with_base


def test_an_adapter_of_some_layers_by_its_configuration_is_complete(
    llama: Path, tmp_path: Path
) -> None:
    folder = write_peft(llama, tmp_path / "a", layers_to_transform=[0])
    kept = {n: t for n, t in load_file(folder / ADAPTER).items() if "layers.0" in n}
    save_file(kept, folder / ADAPTER)
    assert notes_of(folder, "mine")[1] == []


def test_the_command_prints_the_error(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter("OFT", llama, tmp_path / "a", "llama")
    for arguments in (["--rank", "4", "--json"], []):
        out = tmp_path / f"out{len(arguments)}"
        with pytest.raises(SystemExit) as ended:
            app(["convert", str(tmp_path / "a"), str(out), *arguments])
        assert not ended.value.code
    found = capsys.readouterr().out
    record = json.loads(found[: found.rindex("}") + 1])["converted"]
    assert record["kind"] == "lora" and 0.1 < record["relative_error"] < 1
    assert "task_vector" in found and f"hub add {out}" in found


def test_a_folder_in_use_is_refused_before_the_conversion(llama: Path, tmp_path: Path) -> None:
    folder, out = write_peft(llama, tmp_path / "a"), tmp_path / "out"
    assert hub.convert(folder, out).kind == "lora"
    (folder / ADAPTER).write_bytes(b"damaged")
    with pytest.raises(ConflictError, match="is in use") as caught:
        hub.convert(folder, out)
    assert caught.value.hint == "name a new folder"


def test_nothing_is_left_after_a_failure(llama: Path, tmp_path: Path) -> None:
    make_adapter("DoRA", llama, tmp_path / "a", "llama")
    tensors = load_file(tmp_path / "a" / ADAPTER)
    save_file({n: t * torch.nan for n, t in tensors.items()}, tmp_path / "a" / ADAPTER)
    with pytest.raises(HubError, match="NaN"):
        add_expert(tmp_path / "a", "mine", Session())
    with pytest.raises(HubError, match="NaN"):
        hub.convert(tmp_path / "a", tmp_path / "out")
    left = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and "drafts" in p.parts]
    assert left == [] and not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()
