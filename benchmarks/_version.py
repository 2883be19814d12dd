"""Run the cases of one version of the project on demand; `versions.py` starts one for each version.

The script uses the public API alone, so that one file serves several versions.  It reads the name of
a case from each line of its input, runs the case once, and prints its seconds.

Usage: python _version.py FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

EXPERTS, THREADS = 16, 2


def make_cases(folder: Path) -> dict[str, Callable[[], Any]]:
    """Prepare every case.

    Args:
        folder: A folder with `base/`, `expert-*/`, `vector-*/` and `task/`, see `versions.py`.

    Returns:
        Name of a case -> a call that does its work once.
    """
    from experthub import hub

    base, task = str(folder / "base"), str(folder / "task")
    experts = [str(folder / f"expert-{i}") for i in range(EXPERTS)]
    vectors = [str(folder / f"vector-{i}") for i in range(4)]
    recipe: dict[str, Any] = {"base": base, "experts": experts}
    route = recipe | {"route": {"method": "phatgoose", "top_k": 2, "kernel": "sampled"}}
    gather = recipe | {"route": {"method": "phatgoose", "top_k": 2, "kernel": "copied"}}
    linear = recipe | {"merge": {"method": "linear"}}
    ties = recipe | {"experts": vectors, "merge": {"method": "ties"}}
    many, one = torch.randint(5, 200, (1, 512)), torch.randint(5, 200, (1, 1))
    routed, few, merged = (hub.compose(r).model for r in (route, gather, linear))
    cache = few(input_ids=many[:, :64], use_cache=True).past_key_values
    seeds = count()  # a new seed for each run, so that nothing learned before is found again

    def decode() -> None:
        for _ in range(10):
            few(input_ids=one, past_key_values=cache, use_cache=True)
            cache.crop(-1)

    def learn() -> None:
        options = {"method": "adamerging", "granularity": "task", "steps": 6, "batch_size": 8}
        data = {"tasks": [task], "limit": 16}
        few = {"experts": experts[:4], "seed": next(seeds), "data": data, "merge": options}
        hub.compose(recipe | few)

    def train() -> None:
        seed = next(seeds)
        settings = hub.Settings(steps=10, batch_size=4, seed=seed)
        hub.train_lora(base, task, f"trained-{seed}", settings)

    return {
        "compose, routed": lambda: hub.compose(route),
        "compose, linear of LoRAs": lambda: hub.compose(linear),
        "compose, TIES of task vectors": lambda: hub.compose(ties),
        "forward of a route, 512 tokens": lambda: routed(input_ids=many),
        "forward of a merge, 512 tokens": lambda: merged(input_ids=many),
        "decode with a route, 10 tokens": decode,
        "compose, AdaMerging of 6 steps": learn,
        "train a LoRA, 10 steps": train,
    }


def main() -> None:
    """Run in a store of its own until the input ends."""
    torch.set_num_threads(THREADS)
    folder = Path(sys.argv[1]).resolve()
    with TemporaryDirectory() as home:
        os.environ["HUB_HOME"], os.environ["HUB_OFFLINE"] = home, "1"
        os.chdir(home)
        with torch.no_grad():
            cases = make_cases(folder)
        for line in sys.stdin:
            name = line.strip()
            with torch.set_grad_enabled("forward" not in name and "decode" not in name):
                start = time.perf_counter()
                cases[name]()
                print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
