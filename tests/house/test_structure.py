"""Rules on imports, sizes and names, read from the source."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from experthub.merge import merges
from experthub.routing import routers
from sources import ROOT, SOURCES, each_source

PATHS = {
    "experthub." + ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in SOURCES
}
MAX_FILE, MAX_FUNCTION = 300, 60  # lines
# Modules of hub that light commands import, and what loads torch, which they import when it is used.
# Modules of cli defer everything: a command imports what it needs itself.
DEFERRED = {
    "hub.bases.base": {"hub.bases.name_map", "hub.bases.stored_weights"},
    "hub.bases.gguf": {"hub.bases.building", "hub.bases.model_size"},
    "hub.conversion.opening": {"hub.conversion.convert"},
    "hub.kinds.lora": {"hub.formats.safetensors_reader", "hub.kinds.dense_changes"},
    "hub.kinds.placement": {"merge"},
    "hub.transfer.adding": {"hub.proofs.proof"},
    "hub.kinds.task_vector": {"merge"},
    "hub.recipes.method": {"merge", "routing"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """List the modules of this package that a module imports, and whether inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left: list[tuple[ast.AST, bool]] = [(tree, False)]
    while left:
        node, inside = left.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experthub"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in PATHS else str(node.module)), inside
        inside = inside or isinstance(node, ast.FunctionDef)
        left += [(child, inside) for child in ast.iter_child_nodes(node)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {target for target, _ in imports(path)} for name, path in PATHS.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_imports_are_deferred_only_where_they_keep_commands_light() -> None:
    found = defaultdict(set)
    for name, path in PATHS.items():
        for target, inside in imports(path):
            if inside and not name.startswith("experthub.cli"):
                found[name.removeprefix("experthub.")].add(target.removeprefix("experthub."))
    assert dict(found) == DEFERRED


@each_source
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE, "find the second purpose in it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            start = node.lineno
            if ast.get_docstring(node):  # The docstring is not counted.
                start += (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            lines = (node.end_lineno or 0) - start + 1
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines"


def classes() -> Iterator[tuple[str, str]]:
    """List every public class with its module."""
    for name, path in PATHS.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, name


def test_no_two_types_have_one_name() -> None:
    found = defaultdict(list)
    for name, module in classes():
        found[name].append(module)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


def is_constant(node: ast.expr | None) -> TypeGuard[ast.expr]:
    """Return whether an expression consists of texts, numbers and operators."""
    if isinstance(node, ast.BinOp):
        return is_constant(node.left) and is_constant(node.right)
    return (
        is_constant(node.operand)
        if isinstance(node, ast.UnaryOp)
        else isinstance(node, ast.Constant)
    )


def test_no_two_constants_of_one_name_have_two_values() -> None:
    """A text or a number that several modules know by one name has one value."""
    found = defaultdict(set)
    for path in PATHS.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and is_constant(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    found[ast.unparse(target)].add(ast.unparse(node.value))
    found.pop("HINT", None)  # the next step after an error in the module's own format
    assert {name: texts for name, texts in found.items() if len(texts) > 1} == {}


# Names of methods and options that are also words of the hub itself.
WORDS = {
    "task": "a field of an expert, a module of tasks",
    "linear": "a granularity of skills in skills.json",
    "average": "a row of a result file",
    "seed": "a key of a recipe and of training settings",
    "steps": "a field of training settings",
    "lr": "a field of training settings",
    "batch_size": "a field of training settings",
    "combine": "a key of a recipe",
    "scale": "a field of a LoRA",
    "size": "a field of a file's description",
    "examples": "a field of training settings",
    "granularity": "a field of coefficients.json and skills.json",
    "objective": "a field of coefficients.json",
    "embedder": "a field of router.json",
    "temperature": "an option of sampling",
    "groups": "a field of clusters",
    "unknown": "what is printed where a fact is missing",
}


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


# Modules that speak of certain methods: as values of a format, as defaults of a command, as columns
# of a table, as measures that are named after a method, or as what a written recipe suggests.
ABOUT_METHODS = {
    "cli/cluster.py": {"arrow"},
    "cli/evaluate.py": {"best_individual"},
    "cli/train.py": {"mhr"},
    "hub/evaluation/controls.py": {"best_individual"},
    "hub/formats/skills.py": {"poly", "mhr"},
    "hub/selection/clusters.py": {"arrow"},
    "hub/selection/recipe_writing.py": {"phatgoose", "arrow"},
    "hub/training/inventory.py": {"mhr"},
}


def test_hub_and_cli_know_no_method_and_no_option() -> None:
    known = set(merges) | set(routers)
    for strategy in (*merges.values(), *routers.values()):
        known |= set(strategy.options)
    known -= set(WORDS)
    found = defaultdict(set)
    for path in PATHS.values():
        place = path.relative_to(ROOT)
        if place.parts[0] in ("hub", "cli"):
            for _, text in strings(path):
                if text in known:
                    found[str(place)].add(text)
    assert dict(found) == ABOUT_METHODS


def test_hub_reads_no_option_by_name() -> None:
    for path in PATHS.values():
        if path.relative_to(ROOT).parts[0] not in ("hub", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                assert not ast.unparse(node.value).endswith("options"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                by_name = node.args and isinstance(node.args[0], ast.Constant)
                assert not (of.endswith("options") and node.func.attr == "get" and by_name), path
