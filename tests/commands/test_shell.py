"""The command in a shell: what the tab key offers, and examples in every help."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import run_hub
from experthub.cli import _completion
from experthub.cli.main import app
from experthub.merge import merges
from experthub.routing import routers
from test_cli import COMMANDS

HUB = Path(sys.executable).with_name("hub")
BASH = """
source ~/.bashrc
COMP_WORDS=({words}) COMP_CWORD={last}
_hub_completion hub
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home, where completion is installed for bash."""
    home = tmp_path_factory.mktemp("user")
    script = f"{HUB} --install-completion; true"  # the shell that asks is the one that gets it
    subprocess.run(["bash", "-c", script], check=True, env=os.environ | {"HOME": str(home)})
    return home


@pytest.fixture(autouse=True)
def shell(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hub` on the PATH, and a registry that knows two experts and a base."""
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("PATH", f"{HUB.parent}:{os.environ['PATH']}")
    experts = ", ".join(
        f"{{name: {name}, base: b, sources: ['file:x'], digest: 'sha256:{digit * 64}'}}"
        for name, digit in (("far", "0"), ("farther", "1"))
    )
    Path("registry.yaml").write_text(
        f"version: 1\nexperts: [{experts}]\nbases: {{fare: {{sources: ['file:y']}}}}\n"
    )


def run(script: str, **variables: str) -> str:
    """Run a bash script, and return its output; it must succeed without messages."""
    environment = os.environ | variables
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def in_bash(line: str) -> set[str]:
    """List the completions that the installed function of bash offers at the end of the line."""
    words = [*line.split(), *([""] if line.endswith(" ") else [])]
    script = BASH.format(words=shlex.join(words), last=len(words) - 1)
    return set(run(script).split())


def in_zsh(line: str) -> set[str]:
    """Return what the installed function evaluates in zsh: _arguments '*: :(("one":"help" ...))'."""
    found = run("hub", _HUB_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    values = re.findall(r'^(?:_arguments \'\*: :\(\()?"([^"]*)"', found, re.M)
    return {value.replace("\\\\:", ":") for value in values}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("offered", [in_bash, in_zsh])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hub sho", {"show"}),
        ("hub show far", {"far", "fare", "farther"}),
        ("hub pull sentiment farth", {"farther"}),
        ("hub methods pha", {"phatgoose"}),
        ("hub list --b", {"--bases"}),
        ("hub show nothing-like-it", set()),
        ("hub train gate fart", {"farther"}),
        ("hub train lora --base fa", {"fare"}),
        ("hub eval r.yaml --split t", {"test", "train"}),
        ("hub eval r.yaml --score s", {"sum"}),
    ],
)
def test_completion(offered: Any, line: str, expected: set[str]) -> None:
    assert offered(line) == expected


def test_completion_of_versions_and_tasks(tiny_task: str) -> None:
    """In zsh; bash takes words apart at @ and at colons before it asks."""
    assert in_zsh("hub show far@") == {"far@1"}
    for command in ("hub add x --task", "hub eval r.yaml --tasks", "hub train lora --task"):
        assert in_zsh(f"{command} loc") == {tiny_task}


def test_every_command_is_offered() -> None:
    assert in_bash("hub ") == {words[0] for words in COMMANDS if words}
    assert in_zsh("hub tasks ") == {"import", "list"}


def test_completion_looks_into_the_registry_that_is_named() -> None:
    Path("registry.yaml").rename("other.yaml")
    assert in_zsh("hub show --registry other.yaml fart") == {"farther"}
    assert in_zsh("hub show fart") == set()


def test_completion_with_a_damaged_registry_is_silent() -> None:
    Path("registry.yaml").write_text("version: [")
    assert in_zsh("hub show ") == set()


def test_methods_are_those_of_the_catalogues() -> None:
    assert _completion.list_methods() == sorted([*merges, *routers])


@pytest.mark.parametrize("line", ["hub pull ", "hub methods "])
def test_completion_does_not_import_torch(line: str) -> None:
    script = (
        "import sys\nfrom experthub.cli.main import app\n"
        "try:\n    app([])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)\n"
    )
    variables = {"_HUB_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
    run(shlex.join([sys.executable, "-c", script]), **variables)


def test_show_completion() -> None:
    script = run("hub --show-completion; true")
    assert "_HUB_COMPLETE=complete_bash" in script
    run(script + "complete -p hub")


def examples(command: Any) -> list[str]:
    """The commands after `Example:` or `Examples:` in a help text."""
    text = " ".join(f"{command.help or ''} {command.epilog or ''}".split())
    found = re.search(r"Examples?: (.+)", text)
    return [line.strip() for line in found.group(1).split(";")] if found else []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_help_has_examples_that_parse(words: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    lines = examples(command)
    assert lines, f"hub {' '.join(words)} --help has no line `Example: ...`"
    shown = " ".join(run_hub(*words, "--help").out.split())
    for line in lines:
        assert line in shown
        given = shlex.split(line.partition(" | ")[0])
        assert given[: len(words) + 1] == ["hub", *words]
        inner, rest = command, given[len(words) + 1 :]
        while hasattr(inner, "commands"):
            inner, rest = inner.commands[rest[0]], rest[1:]
        inner.make_context(line, rest)
