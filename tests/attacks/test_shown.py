"""Texts of others where they are shown: in shells, on terminals, in plots, cards and recipes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub
from experthub.cli import _completion, _output
from experthub.hub.errors import HubError
from experthub.hub.files.safe_text import escape, escape_block, escape_json
from experthub.hub.tasks.task import Card
from experthub.hub.tasks.task_files import list_references, read_task, tasks_folder

pytestmark = pytest.mark.attack
EVIL = (
    "\x1b[2J\x1b[31m",  # ESC: clears the screen
    "\x1b]0;owned\x07",  # OSC: sets the title
    "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",  # OSC: a link
    "\x9b31m",  # C1
    "\u202egnp.exe",  # bidirectional override
    "\u2066x\u2069",
    "a\rb",
    "a\nerror: b",
    "a\u2028b",
    "\x7f\x08\x08",
    "\ud800",
)
NAMES = (
    "x$(touch ran)",
    "x\\$(touch ran)",
    "`touch ran`",
    "x\\`touch ran\\`",
    "x;touch ran",
    "x'touch ran'",
    'x"$(touch ran)"',
    "x))';touch ran;'((",
    "a b",
    "-rf",
    "~root",
    "x\nerror: y",
    *EVIL,
)


def card(name: str) -> str:
    return json.dumps({"name": name, "source": "made up", "template": "{input}"})


def write_folder(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "card.yaml").write_text(card(name))
    row = {"id": "0" * 16, "input": "a", "choices": ["b", "c"], "answer": 0}
    (folder / "examples.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_tasks_and_suites_are_words(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "theirs", name)
    ran = run_hub("tasks", "import", tmp_path / "theirs")
    assert ran.code in (2, 3) and "name" in ran.lines("error: ")[0] and "Traceback" not in ran.err
    assert ran.err.replace("\n", "").isprintable()
    write_folder(tmp_path / "mine", "fine")
    ran = run_hub("tasks", "import", tmp_path / "mine", "--suite", name)
    assert ran.code == 2 and "is not a task" in ran.lines("error: ")[0], ran.err
    assert ran.err.replace("\n", "").isprintable()
    with pytest.raises(HubError):
        read_task(f"local:{name}")
    assert not tasks_folder().exists()


@pytest.mark.parametrize("name", ["implicatures", "natural_instructions/subtask046_Mi", "a.b-c"])
def test_names_that_tasks_have_are_allowed(name: str) -> None:
    assert Card(name=name, source="x").name == name


def test_completion_offers_words_only() -> None:
    """Even if a folder of tasks got such a name in another way."""
    for name in NAMES[:-1]:
        if "/" not in name and "\ud800" not in name:
            write_folder(tasks_folder() / "local" / name, "fine")
    assert list_references() == _completion.list_tasks() == []


def test_a_shell_runs_nothing_that_completion_prints() -> None:
    """The function of zsh, _arguments, evaluates the values between the brackets once more."""
    write_folder(tasks_folder() / "local" / "x\\$(touch ran)", "fine")
    write_folder(tasks_folder() / "local" / "good", "good")
    hub = Path(sys.executable).with_name("hub")
    variables = {"_HUB_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "hub add x --task l"}
    printed = subprocess.run(
        [hub], env=os.environ | variables, capture_output=True, text=True, check=True
    ).stdout
    values = printed.partition("((")[2].rpartition("))")[0]
    done = subprocess.run(["bash", "-c", f"printf %s {values}"], capture_output=True, text=True)
    assert (done.stdout, Path("ran").exists()) == ("local\\:good", False)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_nothing_that_is_printed_moves_the_cursor(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _output.print_lines([text])
    _output.print_message(f"note: {text}")
    _output.print_table([f">{text}", text], [[text, text]])
    _output.print_fields({"name": text})
    _output.print_json({text: [text]}, compact=True)
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("error") for line in lines)
    found = json.loads(shown.out.splitlines()[-1])
    assert found[text] == [text]
    assert escape(escape(text)) == escape(text)
    assert json.loads(escape_json(json.dumps(text, ensure_ascii=False))) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("text", [*EVIL, "[red]x[/red]", "[link=http://evil]x[/link]", "[/]"])
def test_progress_shows_texts_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal rich would obey markup, and refuse a tag that closes nothing."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with _output.show_progress() as report:
        report(f"fetching {text}", 1, 2)
        report(f"note: {text}", 0, 0)
    shown = terminal.getvalue()
    assert escape(text) in shown and "\x1b]" not in shown and "\x1b[2J" not in shown
    assert shown.count(f"note: {escape(text)}") == 1


def test_a_text_of_a_model_is_escaped_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((Terminal(), "a\n\tb\\x1b[2J\n"), (io.StringIO(), "a\n\tb\x1b[2J\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        _output.print_text("a\n\tb\x1b[2J")
        assert stream.getvalue() == expected
    assert escape_block("a\r\nb") == "a\\r\nb"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("text", ["$\\frac{", "$x$", "$", *EVIL])
def test_plots_show_texts_as_they_are(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from experthub.hub.evaluation.plots import plot_coefficients, plot_similarity

    plot_similarity([[1.0]], [text], "weights", tmp_path / "x.png")
    plot_coefficients([[1.0, 0.5]], [text], [text, "b"], text, tmp_path / "y.png")
    assert (tmp_path / "x.png").stat().st_size and (tmp_path / "y.png").stat().st_size


def test_the_comment_of_a_recipe_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from experthub.hub.files import yaml_files
    from experthub.hub.selection import recipe_writing

    monkeypatch.setattr(recipe_writing, "resolve", lambda *_, **__: None)
    recipe: dict[str, Any] = {"base": "b", "experts": ["x"], "merge": {"method": "linear"}}
    for text in EVIL[:-1]:
        made = f"suggested for {text}\nbase: theirs"
        recipe_writing.write_recipe(Path("r.yaml"), recipe, made, None)  # type: ignore[arg-type]
        assert yaml_files.read(Path("r.yaml")).value["base"] == "b"


MARKDOWN = (
    "<script>alert(1)</script>",
    "![x](http://evil/pixel.png)",
    "[here](javascript:alert(1))",
    "x\n\n# Heading",
    "```\nx\n```",
    "`x` | y | z",
    "a\n---\nlicense: theirs",
    "```` | ```",
    'x")\nimport os  # "',
    "x\rimport os",
    "x\u2028import os",
    "- x",
    "1. x",
    "# x",
    "&lt;b&gt;",
    *EVIL[:-1],
)


@pytest.mark.parametrize("text", MARKDOWN, ids=ascii)
def test_a_model_card_shows_texts_as_they_are(text: str) -> None:
    from experthub.hub.files import yaml_files
    from experthub.hub.registry.expert import Expert, Identity, Score
    from experthub.hub.registry.registry import Registry
    from experthub.hub.transfer.model_card import format_model_card

    expert = Expert(
        name="x",
        base=text,
        sources=["./x"],
        digest="sha256:" + "0" * 64,
        task=text,
        license=text,
        description=text,
        tags=[text],
        training={text: text},
        scores=[Score(task=text, split=text, metric="accuracy", n=1, base=0.0, expert=1.0)],
    )
    identity = Identity.model_validate({"kind": "lora", "base_fingerprint": None, "files": {}})
    card = format_model_card(expert, identity, Registry(()), "o/x")
    card.encode()
    assert all(line.isprintable() for line in card.split("\n"))
    head, body = card.split("---\n")[1:3]
    front = yaml_files.parse(head, "README.md").value
    assert front["license"] == escape(text) and front["tags"][-1] == escape(text)
    lines = body.split("\n")
    assert [line for line in lines if line.startswith("#")] == ["# x", "## Scores", "## Use"]
    fences = [line for line in lines if line.startswith("```")]
    assert fences == ["```yaml", "```", "```python", "```"]
    recipe = body.split("```yaml\n")[1].split("\n```")[0]
    assert yaml_files.parse(recipe, "recipe.yaml").value["base"] == text
    python = body.split("```python\n")[1].split("\n```")[0]
    assert len(python.splitlines()) == 3 and "import os" not in python.splitlines()
    for line in (line for line in lines if line.startswith("| ") and "---" not in line):
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) in (4, 7), line
    described = lines[lines.index("# x") + 2]
    assert not re.search(r"(?<!\\)[<\[`]", described.replace("\\\\", ""))
