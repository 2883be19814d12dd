"""Freeze what this version gives: `make.py store`, `make.py recipes`, `make.py goldens`.

Run it with the python of the version that is to be frozen.  `store` builds the store of tiny models
and experts, `recipes` writes the recipes, and `goldens` writes down what they give: locks, outputs,
digests, and what the commands print.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from frozen.cases import (
    COMMANDS,
    GOLDENS,
    LOCKS,
    OUTPUTS,
    RECIPES,
    STORE,
    Found,
    Observer,
    command,
    inside,
    surroundings,
    unpack,
)
from frozen.recipes import write_recipes
from frozen.store import build, pack
from safetensors.torch import save_file


def make_store(scratch: Path) -> None:
    """Build the store and pack it."""
    build(scratch / "store")
    pack(scratch / "store", STORE)


def make_goldens(scratch: Path) -> None:
    """Write down what every recipe and every command gives."""
    shutil.rmtree(LOCKS, ignore_errors=True)
    LOCKS.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    goldens: dict[str, Any] = {"recipes": {}, "commands": {}}
    project = unpack(scratch / "recipes")
    with inside(project):
        goldens |= {"surroundings": surroundings(), "experthub": version("experthub")}
        observer = Observer(project)
        for path in sorted(RECIPES.glob("*.yaml")):
            found = observer.recipe(path.stem)
            tensors |= {f"{path.stem}.{name}": t for name, t in found.tensors.items()}
            (LOCKS / f"{path.stem}.lock.yaml").write_text(found.lock or "")
            goldens["recipes"][path.stem] = record(found)
            print(path.stem)
    for name in COMMANDS:
        project = unpack(scratch / f"command-{name}")
        with inside(project):
            goldens["commands"][name] = record(command(name, project))
        shutil.rmtree(project)
        print(name)
    GOLDENS.write_text(json.dumps(goldens, indent=1, sort_keys=True) + "\n")
    save_file(tensors, OUTPUTS)


def record(found: Found) -> dict[str, object]:
    """Return what is written down of a result, besides its tensors and its lock."""
    return {"always": found.always, "here": found.here, "exact": found.exact}


def main() -> None:
    """Do what the words on the command line say."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        for word in sys.argv[1:]:
            if word == "store":
                make_store(scratch)
            elif word == "recipes":
                write_recipes(RECIPES)
            else:
                make_goldens(scratch)


if __name__ == "__main__":
    main()
