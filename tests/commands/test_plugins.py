"""Plug-ins that cannot be loaded, and methods that are registered wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub
from experthub.hub.kinds import kinds
from experthub.merge import MergeMaterials, MethodError, merges
from experthub.routing import routers

Make = Callable[..., Path]
METHOD = """from experthub.merge import merges
def fun(vectors, weights):
    return vectors[0]
fun.__name__ = {name!r}
merges.register(paper="https://example.org"{more})(fun)
"""
KIND = """from experthub.hub.kinds import ExpertKind, kinds
kinds.register(ExpertKind("lora", "x", ("x.safetensors",), (), check=lambda folder: []))
"""
BROKEN = {
    "no_module": (None, "ModuleNotFoundError"),
    "no_attribute:gone": ("", "AttributeError"),
    "bad_argument": (METHOD.format(name="own", more=", colour=3"), "TypeError"),
    "taken": (
        METHOD.format(name="own", more="") + METHOD.format(name="linear", more=""),
        "already",
    ),
    "quits": ("raise SystemExit(7)\n", "SystemExit"),
    "taken_kind": (KIND, "the kind 'lora' is registered already"),
}


@pytest.fixture(params=BROKEN)
def broken(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """Install a broken package; return the name of its entry point and the reason."""
    text, reason = BROKEN[request.param]
    module, folder = request.param.partition(":")[0], tmp_path / "site"
    info = folder / "fancy-1.0.dist-info"
    info.mkdir(parents=True)
    if text is not None:
        (folder / f"{module}.py").write_text(text)
    group = "experthub.kinds" if module == "taken_kind" else "experthub.merges"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fancy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nentry = {request.param}\n")
    monkeypatch.syspath_prepend(str(folder))
    for catalogue in (kinds, merges, routers):
        monkeypatch.setattr(catalogue, "_plugins_loaded", False)
        monkeypatch.setattr(catalogue, "broken", {})
    return group, reason


def test_a_broken_package_is_named_and_left_out(
    broken: tuple[str, str],
    expert_folder: Make,
    base_folder: Path,
    home: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning for all commands; what does not use the package works."""
    group, reason = broken
    text = f"base: {base_folder}\nexperts: [{expert_folder()}]\nmerge:\n  method: "
    Path("r.yaml").write_text(f"{text}linear\n")
    Path("theirs.yaml").write_text(f"{text}entry\n")
    Path("unknown.yaml").write_text(f"{text}own\n")
    Path("empty").mkdir()
    place = f"the entry point 'entry' ({group}) of the package fancy cannot be loaded: "
    for words in (["methods"], ["compose", "r.yaml"], ["list"], ["methods"]):
        assert run_hub(*words).code == 0, words
    ran = run_hub("add", "empty", "--name", "x", "--base", base_folder)
    assert ran.code == 3 and "holds no adapter_model.safetensors" in ran.err
    assert [m.partition(reason)[0].partition(place)[0] for m in caplog.messages] == ["warning: "]
    assert reason in caplog.text and "repair or uninstall fancy" in caplog.text
    if group == "experthub.merges":
        ran = run_hub("compose", "theirs.yaml")
        assert ran.code == 1 and ran.err.startswith(f"error: {place}") and reason in ran.err
        assert ran.err.endswith("\nhint: repair or uninstall fancy\n")
        ran = run_hub("compose", "unknown.yaml")
        assert ran.code == 2 and "hint: repair or uninstall fancy if it has this method" in ran.err
    checks = {check["name"]: check for check in run_hub("doctor", "--json").json["checks"]}
    assert checks["plugins"]["status"] == "problem" and reason in checks["plugins"]["found"]
    assert checks["plugins"]["next"] == "repair or uninstall fancy"


@pytest.mark.parametrize("needs", [("dta",), "data", ("data", "gate")])
def test_unknown_materials_are_refused(needs: Any) -> None:
    def own(vectors: Any, weights: Any) -> None: ...

    for catalogue in (merges, routers):
        with pytest.raises(ValueError, match=r"own: .* activations, data, gates, .*found"):
            catalogue.register(paper="https://example.org", needs=needs)(own)
        assert "own" not in catalogue


def test_options_that_a_recipe_cannot_set_are_refused() -> None:
    def bare(stack: Any, *, top=3) -> None: ...  # type: ignore[no-untyped-def]

    def named(stack: Any, *, kernel: int = 2) -> None: ...

    with pytest.raises(ValueError, match="bare: the option 'top' has no type annotation"):
        routers.register(paper="https://example.org")(bare)
    with pytest.raises(ValueError, match="named: an option cannot be named 'kernel'"):
        routers.register(paper="https://example.org")(named)


def test_a_merge_that_reads_data_without_the_need() -> None:
    with pytest.raises(MethodError, match="expected data") as caught:
        MergeMaterials([], None).given_data  # type: ignore[arg-type]  # noqa: B018
    assert caught.value.hint == 'register the merge with needs=("data",)'
