"""The wheel away from the checkout: what is in it, what it can do, and how its API is typed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from sources import PACKAGES, ROOT

LARGE = "torch.*,transformers.*,peft.*,numpy.*,safetensors.*,huggingface_hub.*"
pytestmark = pytest.mark.slow


def run(*words: str | Path, folder: Path, code: int = 0) -> str:
    """Run a command in a folder without the checkout on its path, and return its output."""
    unset = ("PYTHONPATH", "MYPYPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that git tracks or would add, because a build writes into its folder."""
    copy = tmp_path_factory.mktemp("sources")
    names = run(
        *("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"), folder=ROOT
    )
    for name in names.split("\0"):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def environment(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a virtual environment that has the wheel and this environment's packages.

    The editable install is not among them: Python does not run .pth files in a folder that another
    .pth file adds.
    """
    folder = tmp_path_factory.mktemp("environment")
    build = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "wheels")
    run(sys.executable, "-m", "pip", "wheel", ".", *build, folder=sources)
    (wheel,) = (folder / "wheels").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "venv")
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=folder)
    return folder / "venv"


@pytest.fixture(scope="module")
def installed(environment: Path) -> Path:
    """Return the site-packages of that environment; this environment's packages come last."""
    (place,) = environment.glob("lib/python*/site-packages")
    assert {p.name for p in place.iterdir()} == {"experthub", f"experthub-{version()}.dist-info"}
    (place / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def version() -> str:
    from importlib.metadata import version

    return version("experthub")


def test_every_module_is_in_the_wheel(sources: Path, installed: Path) -> None:
    for package in PACKAGES:
        expected = {p.relative_to(sources) for p in (sources / package).rglob("*.py")}
        folder = installed / "experthub"
        assert {p.relative_to(folder) for p in (folder / package).rglob("*.py")} == expected
        assert (folder / package / "py.typed").is_file()
    assert {p.name for p in (installed / "experthub").iterdir()} == set(PACKAGES)
    starter = installed / "experthub" / "hub" / "registry.yaml"
    assert starter.read_bytes() == (sources / "registry.yaml").read_bytes()
    page = Path("hub", "tracing", "page.html")
    assert (installed / "experthub" / page).read_bytes() == (sources / page).read_bytes()
    starters = sources / "examples" / "experts"
    shipped = installed / "experthub" / "hub" / "examples" / "experts"
    files = {p.relative_to(starters): p.read_bytes() for p in starters.glob("*/*")}
    assert {p.relative_to(shipped): p.read_bytes() for p in shipped.rglob("*.*")} == files
    paths = [p for p in (installed / "experthub").rglob("*.*") if p.suffix != ".pyc"]
    size = sum(p.stat().st_size for p in paths)
    assert size - sum(map(len, files.values())) < 2_000_000, "code, and no data"


def test_the_command_works_in_an_empty_folder(
    environment: Path, installed: Path, tmp_path: Path, home: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    hub, python = environment / "bin" / "hub", environment / "bin" / "python"
    assert run(hub, "--version", folder=folder) == f"experthub {version()}\n"
    assert "sentiment@1" in run(hub, "list", "--quiet", folder=folder).split()
    assert "phatgoose" in run(hub, "methods", "--quiet", folder=folder).split()
    text = run(hub, "doctor", folder=folder)
    assert f"in {installed}" in text and str(ROOT) not in text
    script = "from experthub import hub; print(hub.Recipe, hub.Recipe.of, hub.__file__)"
    assert str(installed) in run(python, "-c", script, folder=folder)
    assert not list(folder.iterdir()) and not home.exists()


def test_a_starter_expert_is_pulled_from_the_wheel(
    environment: Path, installed: Path, tmp_path: Path, home: Path
) -> None:
    assert "sentiment@1" in run(environment / "bin" / "hub", "pull", "sentiment", folder=tmp_path)
    shipped = installed / "experthub" / "hub" / "examples" / "experts" / "sentiment"
    stored = [p.read_bytes() for p in (home / "objects").rglob("*") if p.is_file()]
    for name in ("adapter_model.safetensors", "phatgoose_gates.safetensors"):
        assert (shipped / name).read_bytes() in stored


CONSUMER = '''\
"""A program that uses the public API."""

from pathlib import Path

from experthub import hub


def accuracy(recipe: Path, tasks: list[str]) -> float:
    session = hub.Session(hub.Registry.read(), hub.Store())
    plan = hub.resolve(hub.Recipe.read(recipe), session=session)
    composition: hub.Composition = hub.compose(plan, device="cpu")
    composition.save(Path("out"), "hf")
    composition.detach()
    result = hub.evaluate([recipe], tasks, split="test", limit=10, session=session)
    return float(result["average"][recipe.stem]["accuracy"])


def train(base: str, task: str) -> hub.Expert:
    settings = hub.Settings(steps=1, examples=8, batch_size=2, lr=1e-3, seed=0)
    expert: hub.Expert = hub.train_lora(base, task, "mine", settings, rank=2)
    return hub.train_gate(expert.reference, settings)


def names(registry: hub.Registry) -> list[str]:
    try:
        return [expert.name for expert in registry.list_experts()]
    except hub.HubError as error:
        return [error.message, error.hint]
'''
MISUSE = {
    "hub.nothing": "attr-defined",
    "hub.compose(3)": "arg-type",
    'hub.compose("r.yaml", devise="cpu")': "call-arg",
    'hub.evaluate("r.yaml", ["a:b"], split="tset")': "arg-type",
    "hub.Recipe.read(3)": "arg-type",
    "hub.Registry.read().list_experts()[0].nmae": "attr-defined",
    'hub.train_lora("b", "t", "n", 3)': "arg-type",
    "hub.Store().add(3)": "arg-type",
    'hub.HubError("m").code = "x"': "assignment",
    "number: int = hub.Recipe.read(Path()).experts": "assignment",
}


def test_a_program_that_uses_the_api_is_typed(
    environment: Path, installed: Path, tmp_path: Path
) -> None:
    """mypy --strict finds every misuse by name, and nothing else; large packages are not read."""
    wrong = [f"{line}  # {code}" for line, code in MISUSE.items()]
    (tmp_path / "program.py").write_text(CONSUMER + "\n\n" + "\n".join(wrong) + "\n")
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{LARGE}]\nfollow_imports = skip\n")
    words = ("--strict", "--python-executable", environment / "bin" / "python", "program.py")
    text = run(sys.executable, "-m", "mypy", *words, folder=tmp_path, code=1)
    first = len(CONSUMER.splitlines()) + 3
    expected = {(first + i, code) for i, code in enumerate(MISUSE.values())}
    found = re.findall(r"^program\.py:(\d+): error: .*\[([a-z-]+)\]$", text, re.M)
    assert {(int(line), code) for line, code in found} == expected, text
    assert f"Found {len(expected)} errors in 1 file" in text, text
