"""The layer rules, read off the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import PACKAGES, ROOT, each_source

# Modules of hub that load, convert or train models.
MODEL_MODULES = {
    *("building", "fit", "gguf", "loading", "logprobs", "name_map", "preparation"),
    *("proof", "prompted_forward", "row_cache", "train"),
}
WRITING = re.compile(
    r"\.(write_text|write_bytes|rename|touch|hardlink_to|symlink_to)$"
    r"|^os\.(replace|rename|link|symlink)$|^shutil\.(copy|copy2|copyfile|copytree|move)$"
)
# Modules that create empty lock files, or move and link whole files within the store.
MOVES = {
    "hub/maintenance/collection.py": {"rename"},
    "hub/store/leases.py": {"open"},
    "hub/store/objects.py": {"link", "rename"},
}
SOCKETS = {"socket", "http", "urllib", "httpx", "requests", "huggingface_hub"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def writes(path: Path) -> Iterator[str]:
    """List the calls by which a module writes, moves or links files."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {k.arg for k in node.keywords}
        modes = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
        if WRITING.search(name) or (
            name.endswith(".replace") and len(node.args) == 1 and not words
        ):
            yield name.split(".")[-1]
        elif name.split(".")[-1] == "open" and "fileobj" not in words:
            texts = [m.value for m in modes if isinstance(m, ast.Constant)]
            if any(
                isinstance(m, str) and re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", m) for m in texts
            ):
                yield "open"


@each_source
def test_imports_go_to_the_right_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = PACKAGES[PACKAGES.index(package) :]
    for name in imports(path):
        if not name.startswith("experthub"):
            continue
        parts = name.split(".")
        assert parts[1] in allowed, f"{path.name} imports {name}"
        if parts[1] in ("merge", "routing") and parts[1] != package:
            assert len(parts) == 2, f"{path.name} imports {name}, past the façade"


@each_source
def test_what_each_layer_may_import(path: Path) -> None:
    place = path.relative_to(ROOT)
    roots = {name.split(".")[0] for name in imports(path)}
    if place.parts[0] in ("merge", "routing"):
        assert roots <= {"torch", "experthub", *sys.stdlib_module_names}
    if place.parts[:3] != ("hub", "transfer", "remotes"):
        assert not {n for n in imports(path) if n == "urllib.request"} and not (
            roots & (SOCKETS - {"urllib"})
        )
    if "transformers" in roots or "peft" in roots:
        assert place.parts[0] == "hub" and path.stem in MODEL_MODULES


@each_source
def test_house_rules(path: Path) -> None:
    if path.name != "atomic.py" and path.parts[-2] != "remotes":
        allowed = MOVES.get(str(path.relative_to(ROOT)), set())
        assert set(writes(path)) == allowed, "files are written through hub/files/atomic.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception"), "name what is caught"
        assert not isinstance(node, ast.Assert), "assert is for tests"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list"], ["list", "--bases"], ["pull", "--help"], ["tasks", "list"], ["doctor"]],
)
def test_light_commands_do_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom experthub.cli.main import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
