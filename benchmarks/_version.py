"""Time one version of the project in its own process; `versions.py` runs it in two checkouts.

The script uses the public API alone, so that one file serves several versions.  It prints one JSON
object: case -> seconds, the best of a few repetitions.

Usage: python _version.py FOLDER ROUND
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

EXPERTS, THREADS = 16, 2
TASK = ["red", "blue", "green", "grey"]


def best(call: Callable[[], Any], repeats: int) -> float:
    """Return the least time of several calls, in seconds.

    Args:
        call: The call to time.
        repeats: How often it is called, after one call that does not count.

    Returns:
        Seconds.
    """
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(folder: Path, number: int) -> dict[str, float]:
    """Time every case once.

    Args:
        folder: A folder with `base/`, `expert-*/` and `vector-*/`, see `versions.py`.
        number: The number of the round; it is the seed of what is trained, so that no result of
            another round is found again.

    Returns:
        Case -> seconds.
    """
    from experthub import hub

    experts = [str(folder / f"expert-{i}") for i in range(EXPERTS)]
    vectors = [str(folder / f"vector-{i}") for i in range(4)]
    recipe: dict[str, Any] = {"base": str(folder / "base"), "experts": experts}
    route = recipe | {"route": {"method": "phatgoose", "top_k": 2, "kernel": "sampled"}}
    gather = recipe | {"route": {"method": "phatgoose", "top_k": 2, "kernel": "copied"}}
    linear = recipe | {"merge": {"method": "linear"}}
    ties = recipe | {"experts": vectors, "merge": {"method": "ties"}}
    found = {
        "compose, routed": best(lambda: hub.compose(route), 3),
        "compose, linear of LoRAs": best(lambda: hub.compose(linear), 3),
        "compose, TIES of task vectors": best(lambda: hub.compose(ties), 2),
    }
    many, one = torch.randint(5, 200, (1, 512)), torch.randint(5, 200, (1, 1))
    with torch.no_grad():
        model = hub.compose(route).model
        found["forward, 512 tokens"] = best(lambda: model(input_ids=many), 5)
        few = hub.compose(gather).model
        cache = few(input_ids=many[:, :64], use_cache=True).past_key_values

        def step() -> None:
            few(input_ids=one, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        found["decode, one token"] = best(step, 40)
        first = hub.compose(linear).model
        found["forward of a merge, 512 tokens"] = best(lambda: first(input_ids=many), 5)
    task = str(folder / "task")
    data = {"tasks": [task], "limit": 16}

    def learn(steps: int) -> float:
        options = {"method": "adamerging", "granularity": "task", "steps": steps, "batch_size": 8}
        start = time.perf_counter()
        few = recipe | {"experts": experts[:4], "seed": 1000 * number + steps}
        hub.compose(few | {"merge": options, "data": data})
        return time.perf_counter() - start

    def train(steps: int) -> float:
        settings = hub.Settings(steps=steps, batch_size=4, seed=1000 * number + steps)
        start = time.perf_counter()
        hub.train_lora(str(folder / "base"), task, f"trained-{number}-{steps}", settings)
        return time.perf_counter() - start

    learn(1), train(1)
    found["AdaMerging, a step"] = (learn(6) - learn(2)) / 4
    found["training a LoRA, a step"] = (train(12) - train(2)) / 10
    return found


def main() -> None:
    """Measure in a store of its own, and print the result."""
    torch.set_num_threads(THREADS)
    with TemporaryDirectory() as home:
        os.environ["HUB_HOME"], os.environ["HUB_OFFLINE"] = home, "1"
        os.chdir(home)
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))


if __name__ == "__main__":
    main()
