"""A process that measures the memory of one operation: `measured_memory.py WHAT RECIPE WARM_UP TASK`.

It does the operation with a tiny recipe first, so that the libraries are loaded. It prints the
bytes that the operation then takes at its peak, of anonymous memory and of mapped files together:
the weights of a base are pages of its file, which have to be in memory while the model runs.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch
from experthub import hub
from experthub.hub.composition.compose import write_model
from experthub.hub.files.memory import reuse_memory
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session


def read_status(name: str) -> int:
    """Return a size of this process in bytes, such as `VmRSS`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def run(what: str, recipe: str, task: str) -> object:
    """Do what a command does; the result is kept by the caller."""
    if what == "learn":  # Before the base is loaded: pages of its file count for each mapping.
        hub.compose(recipe)
    if what in ("eval", "learn"):
        return hub.evaluate([recipe], [task], limit=24, cache=False)
    if what == "compose":
        return hub.compose(recipe)
    out = Path(mkdtemp(dir=".")) / "out"
    return write_model(resolve(Recipe.read(recipe)), out, "hf", Session())


def main(what: str, recipe: str, warm_up: str, task: str) -> None:
    """Measure one operation."""
    torch.set_num_threads(1)
    reuse_memory()  # As the commands do.
    run(what, warm_up, task)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    kept = run(what, recipe, task)
    print(read_status("VmHWM") - before)
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
