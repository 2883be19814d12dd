"""Kinds of experts: one file each, also one of a third party."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_model
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG
from experthub.hub.kinds import ExpertKind, kinds
from experthub.hub.registry.expert import Identity
from experthub.hub.registry.file_patterns import list_file_patterns
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import _read_record
from pydantic import ValidationError
from safetensors.torch import save_file

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
BUILT_IN = ["lora", "task_vector", "coefficients", "skills", "router", "prompt"]
SHIFT = "norm_shift.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
LAST = "model.norm.weight"


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Path]:
    """The folder of a module `norm_shift`, as the page has it, not yet imported."""
    monkeypatch.setattr(kinds, "_kinds", dict(kinds._kinds))
    monkeypatch.setattr(kinds, "_plugins_loaded", True)
    text = PAGE.read_text(encoding="utf-8")
    (module,) = re.findall(r"<!-- file: norm_shift.py -->\n```python\n(.*?)```\n", text, re.S)
    folder = home.parent / "package"
    folder.mkdir()
    (folder / "norm_shift.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("norm_shift", None)


def shift(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, folder / SHIFT)
    return folder


def two_shifts(place: Path) -> list[dict[str, torch.Tensor]]:
    """Write two experts that share a parameter, and return their changes."""
    torch.manual_seed(3)
    changes = [{NORM: torch.randn(32), LAST: torch.randn(32)}, {LAST: torch.randn(32)}]
    for number, tensors in enumerate(changes):
        shift(place / f"shift-{number}", **{n.replace(".", "__"): t for n, t in tensors.items()})
    return changes


def test_a_kind_of_a_third_party_is_one_file(catalogue: Path, base: Base, tmp_path: Path) -> None:
    """Added, listed, merged with weights: the model is the base plus the sum done by hand."""
    importlib.import_module("norm_shift")
    changes = two_shifts(tmp_path)
    for number in range(2):
        ran = run_hub(
            *("add", tmp_path / f"shift-{number}", "--name", f"shift-{number}"),
            *("--base", base.folder, "--json"),
        )
        assert ran.code == 0 and ran.json["expert"]["kind"] == "norm_shift"
    assert "norm_shift" in run_hub("list").out and run_hub("verify").code == 0

    experts = [{"expert": "shift-0", "weight": 0.5}, {"expert": "shift-1", "weight": -2.0}]
    merge = {"method": "task_arithmetic", "scale": 1.0}
    recipe = {"base": str(base.folder), "experts": experts, "merge": merge, "dtype": "float32"}
    composed = hub.compose(recipe)
    assert list(composed.plan.parameters) == sorted([NORM, LAST])
    found = composed.model.state_dict()
    for name, before in load_model(base, "float32", None).state_dict().items():
        by_hand = before.clone()
        for entry, tensors in zip(experts, changes, strict=True):
            if name in tensors:
                by_hand += entry["weight"] * tensors[name]
        torch.testing.assert_close(found[name], by_hand, rtol=0, atol=1e-6)
        assert torch.equal(found[name], before) == (name not in (NORM, LAST))


def test_it_enters_by_its_entry_point(catalogue: Path, tmp_path: Path) -> None:
    """A name, a folder or a list of all files that needs it imports the package."""
    info = catalogue / "shifts-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: shifts\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[experthub.kinds]\nnorm_shift = norm_shift\n")
    two_shifts(tmp_path)
    script = (
        "import sys\nfrom pathlib import Path\nfrom experthub.hub.kinds import kinds\n"
        "assert kinds['lora'].low_rank and 'norm_shift' not in sys.modules\n"
        "print(kinds.recognise(Path(sys.argv[1])).name, *kinds)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "shift-0")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(catalogue)}, check=False
    )
    assert done.stdout.split() == ["norm_shift", *BUILT_IN, "norm_shift"], done.stderr


def test_an_absent_package_is_named(catalogue: Path, base: Base, tmp_path: Path) -> None:
    importlib.import_module("norm_shift")
    two_shifts(tmp_path)
    ran = run_hub("add", tmp_path / "shift-0", "--name", "s", "--base", base.folder, "--json")
    digest = ran.json["expert"]["digest"]
    kinds._kinds.pop("norm_shift")
    words = "unknown kind 'norm_shift'; .*; install the package that adds this kind"
    assert re.search(words, run_hub("verify").err)
    assert run_hub("list").code == 0
    _read_record.cache_clear()
    with pytest.raises(IntegrityError, match=words):
        hub.Store().read_identity(digest)


def test_a_broken_package_is_reported_once_and_left_out(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = EntryPoint("broken", "experthub_has_no_such_module", "experthub.kinds")
    monkeypatch.setattr("experthub.hub.kinds.kind.entry_points", lambda group: [broken])
    monkeypatch.setattr(kinds, "_plugins_loaded", False)
    for _ in range(2):
        assert list(kinds) == BUILT_IN and "broken" not in kinds
        with pytest.raises(hub.HubError, match=r"'broken'.*no_such_module"):
            kinds["broken"]
    assert len(caplog.messages) == 1 and "no_such_module" in caplog.messages[0]
    monkeypatch.setattr(kinds, "broken", {})


def test_its_own_checks_and_the_hubs(catalogue: Path, base: Base, tmp_path: Path) -> None:
    importlib.import_module("norm_shift")
    matrix = shift(tmp_path / "matrix", x=torch.ones(2, 2))
    with pytest.raises(IntegrityError, match=r"x is F32 \[2, 2\]"):
        read_folder(matrix)
    with pytest.raises(IntegrityError, match="NaN"):
        read_folder(shift(tmp_path / "nan", x=torch.tensor([float("nan")])))
    recipe = {"base": str(base.folder), "merge": {"method": "linear"}}
    wide = shift(tmp_path / "wide", **{LAST.replace(".", "__"): torch.ones(33)})
    with pytest.raises(hub.HubError, match=r"wide changes model.norm.weight \[33\], .* \[32\]"):
        hub.resolve(hub.Recipe.of(recipe | {"experts": [str(wide)]}))
    two_shifts(tmp_path)
    route = {"base": str(base.folder), "route": {"method": "uniform"}}
    with pytest.raises(hub.HubError, match=r"dense|low-rank"):
        hub.resolve(hub.Recipe.of(route | {"experts": [str(tmp_path / "shift-0")]}))
    out = tmp_path / "out"
    assert run_hub("add", tmp_path / "shift-0", "--name", "s", "--base", base.folder).code == 0
    ran = run_hub("export", "s", "--portable", out)
    assert ran.code == 2 and "s@1 is a norm shift" in ran.err


def test_names_and_files_are_of_one_kind(catalogue: Path) -> None:
    def kind(name: str, mark: str) -> ExpertKind:
        return ExpertKind(name, "x", (mark,), (mark,), check=lambda folder: [])

    for name, mark, error in (
        ("lora", "x.safetensors", "'lora' is registered already"),
        ("mine", ADAPTER, "marks the kind 'lora' already"),
        ("mine", "../x.safetensors", "expected a file name"),
        ("mine", "x.bin", "expected a file name"),
    ):
        with pytest.raises(ValueError, match=error):
            kinds.register(kind(name, mark))
    assert list(kinds) == BUILT_IN


def test_a_folder_is_of_the_first_kind_that_fits(
    expert_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = expert_folder()
    for name in ("task_vector.safetensors", "coefficients.safetensors", "router.safetensors"):
        (folder / name).write_bytes(b"")
    assert kinds.recognise(folder).name == "lora"
    (folder / ADAPTER).unlink()
    assert kinds.recognise(folder).name == "task_vector"
    (folder / "task_vector.safetensors").unlink()
    assert kinds.recognise(folder).name == "coefficients"
    with pytest.raises(IntegrityError, match=f"holds no {ADAPTER} and no task_vector.safetensors"):
        kinds.recognise(tmp_path)


@pytest.mark.parametrize("wrong", ["lokr", "", "LORA", "x" * 10_000, 7, None])
def test_an_unknown_kind_is_refused_by_name(
    wrong: Any, catalogue: Path, expert_folder: Callable[..., Path]
) -> None:
    folder = expert_folder()
    record = read_folder(folder).record() | {"kind": wrong}
    with pytest.raises(ValidationError):
        Identity.model_validate(record)
    (folder / "expert.json").write_text(json.dumps({"identity": record}))
    with pytest.raises(IntegrityError) as caught:
        read_folder(folder)
    if isinstance(wrong, str):
        assert "unknown kind" in caught.value.message and len(caught.value.message) < 300
        assert all(name in caught.value.message for name in BUILT_IN)


def test_fetched_folders_keep_their_names() -> None:
    """Folders of model hubs are named after a hash of these names in this order."""
    assert list_file_patterns()[:2] == (ADAPTER_CONFIG, ADAPTER)
    names = [name for name in list_file_patterns() if "[" not in name]
    assert names[2:] == [
        *("task_vector.safetensors", "task_vector.safetensors.index.json"),
        *("phatgoose_gates.safetensors", "coefficients.safetensors", "coefficients.json"),
        *("skills.safetensors", "skills.json", "router.safetensors", "router.json"),
        "expert.json",
    ]
