"""Time one forward of SmolLM2-135M: bare, routed over eight experts, and with peft.

One input of 512 tokens, float32, two threads, logits included.
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
    EXPERTS,
    RANK,
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
from _peer import Peer, peft
from experthub.hub import Plan, Recipe, Registry, compose, resolve
from experthub.hub.bases.base import load_model
from experthub.hub.bases.base_sources import find
from torch import Tensor

TOKENS, TOP_K, TARGET = 512, 2, 1.6


def flops(plan: Plan, config: Any, rows: int) -> tuple[int, int]:
    """Multiply-adds of the base's forward, and those added by `rows` rows of A per module.

    The base: every linear, the output embedding, and attention without the causal mask's savings.
    Added: A x for the rows, B z for the rows, and one probe of every expert.
    """
    shapes = plan.base.shapes
    linears = sum(o * i for o, i in (shapes[name] for name in plan.parameters))
    head = shapes["lm_head.weight"][0] * shapes["lm_head.weight"][1]
    attention = 2 * TOKENS * config.hidden_size * config.num_hidden_layers
    added = sum(rows * (o + i) + EXPERTS * i for o, i in (shapes[n] for n in plan.parameters))
    return TOKENS * (linears + head + attention), TOKENS * added


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def parity(peer: Peer, base: Any, merged: Any, ids: Tensor, folder: Path) -> dict[str, float]:
    """peft with eight active adapters of weight 1 against our `task_arithmetic` with scale 1."""
    peer.ask(f"eight {folder / 'logits.pt'}")
    theirs = torch.load(folder / "logits.pt", weights_only=True)
    ours, bare = merged(input_ids=ids).logits, base(input_ids=ids).logits
    return {
        "max_abs_difference": difference(ours, theirs),
        "max_abs_change_by_experts": difference(ours, bare),
        "max_abs_logit": float(ours.abs().max()),
    }


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments(__doc__)
    torch.set_num_threads(THREADS)
    found = find(BASE, Registry.read())
    with TemporaryDirectory() as name:
        folder = Path(name)
        experts = make_experts(folder / "experts", found)
        store, file = add_experts(folder, experts)
        peer = peft(options.cache, found.folder, experts)
        around = surroundings(peer.versions)
        recipe = {"base": BASE, "experts": [e.name for e in experts], "dtype": "float32"}
        registry = Registry.read(file)
        route = {"method": "phatgoose", "top_k": TOP_K}
        plan = resolve(Recipe.of(recipe | {"route": route}), registry, store)
        base = load_model(found, "float32", "cpu")
        routed = compose(plan, model=base, store=store).model
        sums = recipe | {"merge": {"method": "task_arithmetic", "scale": 1.0}}
        merged = compose(sums, model=base, registry=registry, store=store).model
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(base.config.vocab_size, (1, TOKENS), generator=random)
        peer.ask(f"input {ids[0].tolist()}")
        cases: dict[str, Callable[[], float]] = {
            "base": timed(lambda: base(input_ids=ids, use_cache=False).logits),
            "routed": timed(lambda: routed(input_ids=ids, use_cache=False).logits),
            "base in peft's process": lambda: peer.ask("base"),
            "peft, one active": lambda: peer.ask("one"),
            "peft, eight active": lambda: peer.ask("eight"),
        }
        with torch.no_grad():
            times = run_rounds(cases, options.rounds)
            agreement = parity(peer, base, merged, ids, folder)
        peer.close()
    of_base, dense = flops(plan, base.config, EXPERTS * RANK)
    _, sparse = flops(plan, base.config, TOP_K * RANK)
    limits = {"all eight": 1 + dense / of_base, f"top {TOP_K} only": 1 + sparse / of_base}
    for case, seconds in times.items():
        print(f"{case:24} {spread(seconds):32} {ratio(times, case, 'base'):6.3f} x base")
    for what, limit in limits.items():
        print(f"{'limit by flops, ' + what:57} {limit:6.3f} x base")
    print(f"target: routed <= {TARGET} x base")
    print("parity, peft eight active against task_arithmetic:", agreement)
    result = {
        "benchmark": "route",
        "surroundings": around,
        "seconds": times,
        "median_seconds": {case: median(seconds) for case, seconds in times.items()},
        "ratio_to_base": {case: ratio(times, case, "base") for case in times},
        "limit_by_flops": limits,
        "target": TARGET,
        "parity": agreement,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
