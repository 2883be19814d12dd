"""Every command meets damaged inputs of every kind: one sentence and a documented exit code."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Ran, run_hub
from damaged_world import LINES, World, build, list_commands

pytestmark = pytest.mark.attack

CODES = {0, 1, 2, 3, 4, 5, 6}
STATES = "home/runs/*/found/"
BASE = "compose eval trace suggest diff doctor|train lora|train skills"
BASES = "list show|base list|base show|base rm|base add"
HOME = "list show search pull compose eval verify gc du rm"
# The files that are damaged, and the commands that read them.
FILES = {
    "base/config.json": BASE,
    "base/generation_config.json": "generate trace",
    "base/tokenizer.json": BASE,
    "base/tokenizer_config.json": BASE,
    "base/model.safetensors": BASE,
    "encoder/tokenizer.json": "suggest cluster router eval",
    "a/adapter_config.json": "add",
    "a/adapter_model.safetensors": "add",
    "a/phatgoose_gates.safetensors": "add",
    "v/task_vector.safetensors": "add",
    "s/skills.json": "add",
    "s/skills.safetensors": "add",
    f"{STATES}coefficients.json": "coefficients verify compose",
    f"{STATES}coefficients.safetensors": "coefficients verify compose",
    f"{STATES}router.json": "router verify eval",
    f"{STATES}router.safetensors": "router verify eval",
    "copy/config.json": "|base add",
    "copy/model.safetensors": "|base add",
    "model.gguf": "convert|base add",
    "lora.gguf": "convert",
    "ollama/blobs/*": "|base add",
    "ollama/manifests/*/*/*/*": "|base add",
    "dora/adapter_config.json": "add convert",
    "dora/adapter_model.safetensors": "add convert",
    "mlx/adapter_config.json": "convert",
    "mlx/adapters.safetensors": "convert",
    "pickled/adapter_config.json": "convert",
    "pickled/adapter_model.bin": "convert",
    "kohya/lora.safetensors": "convert",
    "diffusers/*.safetensors": "convert",
    "home/registry/mine/*": BASES,
    "work/merge.yaml": "compose lock update eval",
    "work/merge.lock.yaml": "compose lock update verify gc",
    "work/registry.yaml": f"{HOME} add update {BASE}",
    "work/archive.tar": "import pull",
    "task/card.yaml": "tasks import",
    "task/examples.jsonl": "tasks import",
    "home/registry/a/1.yaml": f"{HOME} update export push",
    "home/tasks/local/parity/card.yaml": f"{HOME}|tasks list|train gate|train adapt",
    "home/tasks/local/parity/examples.jsonl": f"{HOME}|tasks list|train gate|train adapt",
    "home/results/*/*.json": "eval verify gc",
    "home/roots/*": "verify gc du",
    "home/fingerprints/*.json": BASE,
    "home/objects/*/*/*": f"{HOME} export push coefficients router generate",
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: random.Random(len(content)).randbytes(200),
    "list": lambda _: b"[1, 2]",
    "digits": lambda _: b'{"version": ' + b"9" * 5000 + b"}",
    "surrogates": lambda content: re.sub(rb'"\w+": ', rb'"\\ud800": ', content, count=3),
    "deep": lambda _: b"[" * 3000,
    "nul": lambda content: content.replace(b"e", b"\0"),
}


@pytest.fixture(autouse=True)
def offline(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach no server."""
    monkeypatch.setenv("HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sound folder and a copy of it, made once."""
    root = tmp_path_factory.mktemp("world") / "world"
    (root / "work").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setenv("HUB_HOME", str(root / "home"))
        patch.setenv("OLLAMA_MODELS", str(root / "ollama"))
        patch.chdir(root / "work")
        build(root)
    copy = root.with_name("sound")
    shutil.copytree(root, copy, symlinks=True)
    return root, copy


@pytest.fixture
def world(sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> World:
    """The folder as it was made. Its path is always the same, because locks and entries have it."""
    root, copy = sound
    shutil.rmtree(root)
    shutil.copytree(copy, root, symlinks=True)
    monkeypatch.setenv("HUB_HOME", str(root / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(root / "ollama"))
    monkeypatch.chdir(root / "work")
    return World(root)


def find(world: World, pattern: str) -> Path:
    return min(world.root.glob(pattern), key=str)


def check(words: tuple[str, ...], ran: Ran) -> None:
    """A command may work or fail; if it fails, it says why in one sentence."""
    assert ran.code in CODES, (words, ran)
    assert "Traceback" not in ran.out + ran.err, (words, ran.err)
    if ran.code and words[0] not in ("verify", "doctor"):
        assert len(ran.lines("error: ")) == 1, (words, ran)
        assert len(ran.lines("error: ")[0]) < 1500, (words, ran)


def run_all(world: World, names: Iterable[str] = LINES) -> None:
    for name in names:
        for words in LINES[name]:
            check(words, run_hub(*words))
            shutil.rmtree(world.work / "out", ignore_errors=True)


def test_no_command_is_left_out() -> None:
    from experthub.cli.main import app

    command: Any = typer.main.get_command(app)
    assert set(list_commands(command)) == set(LINES)


def test_sound_inputs_work(world: World) -> None:
    for lines in LINES.values():
        for words in lines:
            ran = run_hub(*words)
            assert ran.code == 0, (words, ran.err)
            shutil.rmtree(world.work / "out", ignore_errors=True)


def find_readers(names: str) -> list[str]:
    """The commands of an entry; a bar stands before names of two words."""
    single, *double = names.split("|")
    return [*([single] if single in LINES else single.split()), *double]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file(pattern: str, number: int, world: World) -> None:
    """Two damages of every file, chosen by its name; those of the other test reach all files."""
    kinds = random.Random(pattern).sample(sorted(DAMAGES), 2)
    damage(find(world, pattern), DAMAGES[kinds[number]])
    run_all(world, find_readers(FILES[pattern]))


@pytest.mark.parametrize("kind", DAMAGES)
def test_everything_is_damaged(kind: str, world: World) -> None:
    for pattern in FILES:
        damage(find(world, pattern), DAMAGES[kind])
    run_all(world)


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.chmod(0o644)
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("pattern", ["base/*.json", "a/*", "work/*.yaml", "home/registry/*/*"])
def test_a_folder_in_place_of_each_file(pattern: str, world: World) -> None:
    for path in list(world.root.glob(pattern)):
        path.unlink()
        path.mkdir()
    run_all(world)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["home/registry", "home/tasks", "home/objects", "home/locks"])
def test_a_file_in_place_of_a_folder(name: str, world: World) -> None:
    shutil.rmtree(world.root / name, ignore_errors=True)
    (world.root / name).write_text("x")
    run_all(world)


def test_a_link_to_itself(world: World) -> None:
    for pattern in ("base/config.json", "work/merge.yaml", "home/registry/a/1.yaml"):
        path = find(world, pattern)
        path.unlink()
        path.symlink_to(path)
    run_all(world)


HUB = "from experthub.cli.main import app; app()"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("list | head -0", 1),
        ("list >&-", 0),
        ("list --json >&- 2>&- <&-", 0),
        ("show nothing 2>&-", 4),
        ("list <&- >/dev/null", 0),
        ("list >/dev/full", 1),
        ("show $'\\xff\\xfe'", 2),
        ("show $'a\\xed\\xa0\\x80'", 2),
    ],
)
def test_streams_of_the_shell(line: str, code: int, world: World) -> None:
    script = f'"{sys.executable}" -c "{HUB}" {line}; exit ${{PIPESTATUS[0]}}'
    ran = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120, check=False)
    assert ran.returncode == code, ran.stderr
    assert b"Traceback" not in ran.stderr and b"Exception ignored" not in ran.stderr
