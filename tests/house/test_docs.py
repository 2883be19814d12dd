"""The documentation against the code: what it shows runs, parses, validates, or is generated.

Code blocks are marked by an HTML comment on the line before them:

    <!-- run -->            python that runs, in the page's order, in the folder of `page_folder`
    <!-- file: NAME -->     written to NAME in that folder before the blocks after it run
    <!-- wrong: NAME -->    a recipe that is refused with the text of the next text block
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import itertools
import json
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_conformance
import typer
from conftest import make_expert
from experthub import cli, hub, merge, routing
from experthub.cli.main import app
from experthub.hub.errors import HubError
from experthub.hub.files import yaml_files
from experthub.hub.registry.expert import Expert
from experthub.hub.registry.registry_file import RegistryFile
from experthub.hub.store.folder import read_folder
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.transfer.describe import write_description
from experthub.merge import merges
from experthub.routing import routers
from sources import ROOT, SOURCES

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = "smollm2-135m-instruct"
EXPERTS = ("sentiment", "intent-recognition", "question-typing")
KEYS = {"base", "experts"}  # of a recipe, and of nothing else that is YAML here


@dataclass(frozen=True)
class Block:
    """A fenced block with its language, its marker, its text, and the line where it starts."""

    page: Path
    line: int
    language: str
    marker: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = re.fullmatch(r"<!-- (.+) -->", lines[start - 1]) if start else None
        yield Block(
            page,
            start + 1,
            lines[start].removeprefix("```"),
            before.group(1) if before else "",
            "\n".join(lines[start + 1 : number]) + "\n",
        )
        start = None
    assert start is None, f"{page.name}: the block of line {start} does not end"


BLOCKS = [block for page in PAGES for block in blocks(page)]


def select_blocks(language: str) -> list[Any]:
    return [pytest.param(b, id=str(b)) for b in BLOCKS if b.language == language]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    for path, text in load_generator().pages().items():
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert found == text, f"docs/{path.name} is stale: run python docs/generate.py"


@pytest.fixture
def page_folder(base_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder as a small project: the starter names are tiny random models here."""
    here = Path.cwd()
    entries = []
    for seed, name in enumerate(EXPERTS):
        folder = make_expert(here / "examples" / "experts" / name, base_folder, seed, size=0.1)
        identity = read_folder(folder)
        source = f"file:{folder.relative_to(here)}"
        expert = Expert(
            name=name,
            base=BASE,
            sources=[source],
            digest=identity.digest,
            task="bigbench:snarks",
        )
        write_description(folder, expert, identity)
        entries.append(expert.model_dump(mode="json", exclude_unset=True))
    bases = {BASE: {"sources": [f"file:{base_folder}"]}}
    registry = {"version": 1, "bases": bases, "experts": entries}
    (here / "registry.yaml").write_text(yaml_files.dump(registry))
    choices = ["yes", "no"]
    examples = [
        Example(id=example_id(str(n), choices), input=str(n), choices=choices, answer=n % 2)
        for n in range(120)
    ]
    for name in ("implicatures", "snarks"):  # the second is what the experts were trained on
        write_task("bigbench", Card(name=name, source="made-up"), examples)
    monkeypatch.syspath_prepend(str(here))
    known = [dict(catalogue._strategies) for catalogue in (merges, routers)]
    modules = set(sys.modules)
    yield here
    for catalogue, before in zip((merges, routers), known, strict=True):
        catalogue._strategies.clear()
        catalogue._strategies.update(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(here)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_marked_blocks_run(page: Path, page_folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        kind, _, name = block.marker.partition(": ")
        if kind == "file":
            (page_folder / name).write_text(block.text, encoding="utf-8")
        elif kind == "run":
            assert block.language == "python", f"{block} is marked to run"
            exec(compile(block.text, str(block), "exec"), names)


def test_every_python_block_is_tested() -> None:
    for block in BLOCKS:
        assert re.fullmatch(r"|run|(file|wrong): [\w.-]+", block.marker), f"{block}: {block.marker}"
        assert block.marker or block.language != "python", f"{block} is neither run nor a file"


@pytest.fixture
def installed_methods(page_folder: Path) -> dict[str, Any]:
    """The files of docs/extending.md as an installed package; its entry points by group."""
    files = {b.marker.removeprefix("file: "): b.text for b in blocks(ROOT / "docs/extending.md")}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    for name in (name for name in files if name.endswith(".py")):
        (page_folder / name).write_text(files[name], encoding="utf-8")
    info = page_folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for catalogue in (merges, routers):
        catalogue._plugins_loaded = False
    return dict(project["entry-points"])


def test_methods_of_the_docs_enter_and_conform(installed_methods: dict[str, Any]) -> None:
    """Found by their entry points alone; every test of the conformance suite passes on them."""
    for catalogue in (merges, routers):
        for name in installed_methods[catalogue.group]:
            strategy = catalogue[name]
            suite = getattr(test_conformance, test_conformance.suite_name(strategy))
            count = 0
            for test in (m for m in dir(suite) if m.startswith("test_")):
                for values in _parameters(suite, getattr(suite, test)):
                    getattr(suite(), test)(strategy=strategy, **values)
                    count += 1
            assert count >= 5


def _parameters(suite: type, test: Any) -> Iterator[dict[str, Any]]:
    """List the combinations of parameters, besides the strategy, with which a test runs."""
    marks = [*suite.pytestmark, *getattr(test, "pytestmark", ())]  # type: ignore[attr-defined]
    given = [mark.args for mark in marks if mark.name == "parametrize"]
    given = [(name, values) for name, values in given if name != "strategy"]
    for values in itertools.product(*(values for _, values in given)):
        yield dict(zip((name for name, _ in given), values, strict=True))


@pytest.mark.parametrize("block", select_blocks("yaml"))
def test_yaml_is_valid(block: Block, page_folder: Path) -> None:
    """Recipes validate, and resolve where they use starter names only; so do the other formats."""
    name = block.marker.partition(": ")[2] or str(block)
    document = yaml_files.parse(block.text, name)
    assert isinstance(document.value, dict), f"{block} is not a mapping"
    if block.marker.startswith("wrong"):
        with pytest.raises(HubError) as caught:
            hub.Recipe.of(document)
        shown = next(b for b in BLOCKS if b.page == block.page and b.line > block.line)
        assert shown.text == f"error: {caught.value.message}\nhint: {caught.value.hint}\n"
    elif set(document.value) >= KEYS:
        recipe = hub.Recipe.of(document)
        if not re.search(r"\./|:\w|@\d", block.text):
            assert hub.resolve(recipe).digest.startswith("sha256:")
    elif "template" in document.value:
        yaml_files.validate(Card, document)
    else:
        yaml_files.validate(RegistryFile, document)


@pytest.mark.parametrize("block", select_blocks("json"))
def test_json_parses(block: Block) -> None:
    json.loads(block.text)


def commands(text: str) -> Iterator[list[str]]:
    """Every `hub ...` of a shell block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        for words in _split(shlex.split(line, comments=True)):
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and Path(words[0]).name == "hub":
                yield words[1:]


def _split(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in ("|", "&&", "||", ";"):
            yield part
            part = []
        else:
            part.append(word)
    yield part


@pytest.mark.parametrize("block", select_blocks("sh"))
def test_commands_parse(block: Block) -> None:
    for words in commands(block.text):
        command: Any = typer.main.get_command(app)
        names = ["hub"]
        while words and words[0] in getattr(command, "commands", {}):
            names.append(words[0])
            command, words = command.commands[words[0]], words[1:]
        assert not hasattr(command, "commands"), f"{block}: {' '.join(names + words)}"
        command.make_context(" ".join(names), list(words))


def modules() -> list[str]:
    found = []
    for package in (merge, routing, hub, cli):
        found.append(package.__name__)
        walked = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [module.name for module in walked]
    return found


def test_doctests() -> None:
    names = modules()
    assert {
        "experthub.hub.recipes.recipe",
        "experthub.hub.transfer.remotes.pypi",
        "experthub.cli.main",
    } <= set(names)
    for name in names:
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", t.replace("`", "")).strip().lower().replace(" ", "-")
        for t in titles
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_internal_links_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_results_are_those_of_the_suites() -> None:
    found = runpy.run_path(str(ROOT / "examples/suite/table.py"))["page"]()
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == found


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {name for name in names if f"(docs/{name}.md" not in text} == set()


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {p.stem for p in SOURCES if p.relative_to(ROOT).parts[0] != "cli"} - {"__init__"}
    assert {name for name in names if f"`{name}`" not in text} == set()
