"""Time loading SmolLM2-135M: bare, composed with eight experts, and adapted by peft.

The experts are in the store, and every file is in the page cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _bench import (
    BASE,
    THREADS,
    add_experts,
    arguments,
    finish,
    make_experts,
    ratio,
    run_rounds,
    spread,
    surroundings,
    timed,
)
from _peer import peft
from experthub.hub import Recipe, Registry, compose, resolve
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.fingerprint import list_weight_files
from experthub.hub.bases.loading import load_model
from experthub.hub.session import Session

METHODS = {
    "route": {"route": {"method": "phatgoose", "top_k": 2}},
    "merge": {"merge": {"method": "linear"}},
}


def read(files: list[Path]) -> int:
    """Read every byte of the files once, which is the limit of loading them.

    Args:
        files: The files.

    Returns:
        The number of bytes.
    """
    buffer, total = bytearray(1 << 22), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def main() -> None:
    """Run the benchmark and print its table."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    options = arguments(__doc__)
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    found = find(BASE, Session())
    with TemporaryDirectory() as name:
        folder = Path(name)
        experts = make_experts(folder / "experts", found)
        store, file = add_experts(folder, experts)
        peer = peft(options.cache, found.folder, experts)
        around = surroundings(peer.versions)
        recipe = {"base": BASE, "experts": [e.name for e in experts], "dtype": "float32"}
        recipes = {kind: recipe | method for kind, method in METHODS.items()}
        base = load_model(found, "float32", "cpu")

        def composed(kind: str, model: Any = None) -> Any:
            return compose(recipes[kind], model=model, session=Session(Registry.read(file), store))

        def resolved() -> Any:
            return resolve(Recipe.of(recipes["route"]), session=Session(Registry.read(file), store))

        def bare() -> Any:
            return AutoModelForCausalLM.from_pretrained(found.folder, dtype="float32")

        def resident() -> Any:
            model = bare()
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            return model

        shapes = [found.shapes[name] for name in resolved().parameters]
        changed = sum(outputs * inputs for outputs, inputs in shapes)
        base_files = list_weight_files(found.folder)
        files = [path for place in experts for path in place.glob("*.safetensors")]
        cases: dict[str, Callable[[], float]] = {
            "bare load": timed(bare),
            "bare load, in memory": timed(resident),
            "compose, route": timed(lambda: composed("route")),
            "compose, merge": timed(lambda: composed("merge")),
            "onto a base, route": timed(lambda: composed("route", base)),
            "onto a base, merge": timed(lambda: composed("merge", base)),
            "resolve only": timed(resolved),
            "onto a base, peft": lambda: peer.ask("load"),
            "peft, low_cpu_mem": lambda: peer.ask("load low_cpu_mem_usage"),
            "read base": timed(lambda: read(base_files)),
            "read experts": timed(lambda: read(files)),
            "fill merged weights": timed(lambda: torch.empty(changed).fill_(1.0)),
        }
        times = run_rounds(cases, options.rounds)
        peer.close()
        sizes = {"base_bytes": read(base_files), "expert_bytes": read(files)}
        sizes["merged_bytes"] = 4 * changed
    print(f"{'':24} {'median (smallest to largest)':32} x bare load  x peft")
    for case, seconds in times.items():
        to_bare, to_peft = ratio(times, case, "bare load"), ratio(times, case, "onto a base, peft")
        print(f"{case:24} {spread(seconds):32} {to_bare:11.3f}  {to_peft:6.3f}")
    in_memory = ratio(times, "compose, merge", "bare load, in memory")
    print(f"compose, merge: {in_memory:.3f} x bare load, in memory")
    print("targets: compose <= 3 x bare load; onto a base <= 0.1 x peft")
    print(
        f"bytes: base {sizes['base_bytes']:,}, eight experts {sizes['expert_bytes']:,}, "
        f"merged weights {sizes['merged_bytes']:,}"
    )
    result = {
        "benchmark": "load",
        "surroundings": around,
        "seconds": times,
        "median_seconds": {case: median(seconds) for case, seconds in times.items()},
        "ratio_to_bare_load": {case: ratio(times, case, "bare load") for case in times},
        "ratio_to_peft": {case: ratio(times, case, "onto a base, peft") for case in times},
        "targets": {"compose / bare load": 3.0, "onto a base / peft": 0.1},
        "bytes": sizes,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
