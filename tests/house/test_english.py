"""Docstrings, errors and hints are complete sentences, and docstrings match their functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sources import ROOT, SOURCES, each_source

TESTS = sorted((ROOT / "tests").rglob("*.py"))
# A docstring that starts with one of these words is a fragment, and no sentence.
FRAGMENTS = {
    "of",
    "what",
    "whose",
    "that",
    "those",
    "these",
    "as",
    "whether",
    "how",
    "where",
    "which",
    "when",
    "who",
    "why",
    "for",
    "from",
    "to",
    "by",
    "with",
    "without",
    "if",
    "see",
    "also",
    "not",
    "no",
}
ERRORS = ("HubError", "UsageError", "IntegrityError", "NotFoundError", "AuthError", "ConflictError")
METHOD_ERRORS = ("MethodError", "MethodFailure")
RAISED = (*ERRORS, *METHOD_ERRORS, "ValueError", "KeyError", "TimeoutError")
# What a hint may start with: a verb in the imperative, or a question that names the right word.
VERBS = {
    "add",
    "allow",
    "ask",
    "build",
    "call",
    "change",
    "check",
    "choose",
    "compose",
    "copy",
    "correct",
    "create",
    "cut",
    "declare",
    "delete",
    "did",
    "do",
    "exclude",
    "export",
    "fetch",
    "find",
    "fix",
    "free",
    "get",
    "give",
    "import",
    "increase",
    "install",
    "keep",
    "learn",
    "leave",
    "let",
    "list",
    "load",
    "lock",
    "log",
    "look",
    "lower",
    "make",
    "match",
    "measure",
    "merge",
    "move",
    "name",
    "open",
    "pass",
    "pin",
    "point",
    "pull",
    "push",
    "put",
    "quote",
    "raise",
    "read",
    "reduce",
    "register",
    "remove",
    "rename",
    "repair",
    "repeat",
    "replace",
    "restore",
    "route",
    "run",
    "save",
    "see",
    "select",
    "set",
    "shorten",
    "show",
    "shrink",
    "simplify",
    "spell",
    "split",
    "start",
    "state",
    "store",
    "trace",
    "train",
    "truncate",
    "try",
    "turn",
    "unset",
    "update",
    "upgrade",
    "use",
    "wait",
    "wrap",
    "write",
}


@dataclass(frozen=True)
class Definition:
    """A public function or class, and where it stands."""

    path: Path
    node: ast.FunctionDef | ast.ClassDef
    owner: ast.ClassDef | None

    def __str__(self) -> str:
        owner = f"{self.owner.name}." if self.owner else ""
        return f"{self.path.relative_to(ROOT)}:{self.node.lineno} {owner}{self.node.name}"

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    def is_decorated(self, *names: str) -> bool:
        found = (d.func if isinstance(d, ast.Call) else d for d in self.node.decorator_list)
        return any(ast.unparse(d).split(".")[-1] in names for d in found)


def definitions(path: Path) -> Iterator[Definition]:
    """The public functions, classes and methods of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield Definition(path, node, None)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield Definition(path, inner, node)


def all_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of every docstring, private ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node)
            if doc:
                yield getattr(node, "lineno", 1), doc


def section(doc: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n)*)", doc, re.M)
    return found[1] if found else ""


def entries(text: str) -> list[str]:
    """The names of a section's entries: those at the least indentation, before a colon."""
    return [m.replace("*", "") for m in re.findall(r"^    ([\w*.]+)(?: \([^)]*\))?: ", text, re.M)]


def is_protocol(owner: ast.ClassDef | None) -> bool:
    return owner is not None and any("Protocol" in ast.unparse(base) for base in owner.bases)


def parameters(node: ast.FunctionDef) -> list[str]:
    spec = node.args
    known = [*spec.posonlyargs, *spec.args, *([spec.vararg] if spec.vararg else [])]
    known += [*spec.kwonlyargs, *([spec.kwarg] if spec.kwarg else [])]
    return [a.arg for a in known if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def raised(node: ast.FunctionDef) -> set[str]:
    """The errors that a function raises by itself, and not in a function inside of it."""
    found: set[str] = set()
    left: list[ast.AST] = list(node.body)
    while left:
        here = left.pop()
        if isinstance(here, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(here, ast.Raise) and isinstance(here.exc, ast.Call):
            found.add(ast.unparse(here.exc.func))
        left += ast.iter_child_nodes(here)
    return found & set(RAISED)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_first_lines_are_sentences(path: Path) -> None:
    for line, doc in all_docstrings(path):
        first = doc.split("\n\n")[0]
        word = re.split(r"\W", first)[0].lower()
        assert word not in FRAGMENTS, f"{path.name}:{line} starts with {word!r}: {first}"
        assert first.rstrip("`*_").endswith((".", "?", ":")), (
            f"{path.name}:{line} has no end: {first}"
        )


def wrong_docstrings(found: Definition) -> Iterator[str]:
    """List the differences between a public function's docstring and its signature."""
    node, doc = found.node, found.doc
    if not doc:
        yield "has no docstring"
    if not isinstance(node, ast.FunctionDef) or not doc:
        return
    if found.is_decorated("property", "cached_property", "setter", "command", "callback"):
        return
    if found.path.parts[-2] == "cli" or (is_protocol(found.owner) and len(parameters(node)) < 3):
        return  # the help of a command is its docstring
    wanted = parameters(node)
    named = entries(section(doc, "Args"))
    if named != wanted:
        yield f"Args are {named}, and the parameters {wanted}"
    returns = ast.unparse(node.returns) if node.returns else "None"
    gives = returns not in ("None", "NoReturn", "Self")
    has = bool(section(doc, "Returns") or section(doc, "Yields"))
    if has and not gives:
        yield "Returns stands beside a function that returns nothing"
    if gives and not has and not found.is_decorated("contextmanager"):
        yield f"Returns is missing: {returns}"
    unnamed = raised(node) - set(entries(section(doc, "Raises")))
    if unnamed:
        yield f"Raises does not name {sorted(unnamed)}"


@each_source
def test_docstrings_match_their_signatures(path: Path) -> None:
    wrong = [f"{d}: {text}" for d in definitions(path) for text in wrong_docstrings(d)]
    assert not wrong, "\n".join(wrong)


def hints(path: Path) -> Iterator[tuple[int, str]]:
    """The texts that a hint may be, of every error that is made with one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (*ERRORS, *METHOD_ERRORS):
            given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "hint")]
            for hint in given:
                yield from ((node.lineno, text) for text in texts_of(hint))


def texts_of(node: ast.expr) -> Iterator[str]:
    """The beginnings that an expression of texts can have."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant):
            yield str(first.value)
    elif isinstance(node, ast.IfExp):
        yield from texts_of(node.body)
        yield from texts_of(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts_of(value)
    elif isinstance(node, ast.BinOp):
        yield from texts_of(node.left)


@each_source
def test_hints_start_with_a_verb(path: Path) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {hint}"
        for line, hint in hints(path)
        if hint and re.split(r"[^A-Za-z]", hint)[0].lower() not in VERBS
    ]
    assert not wrong, "\n".join(wrong)
