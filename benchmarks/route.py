"""Time one forward pass of SmolLM2-135M: bare, routed over eight experts, and with peft.

The input has 512 tokens. The model runs in float32 with two threads and computes all logits.
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
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.session import Session
from torch import Tensor

TOKENS, TOP_K, TARGET = 512, 2, 1.6


def flops(plan: Plan, config: Any, rows: int) -> tuple[int, int]:
    """Count the multiply-adds of the base's forward pass, and those that the experts add.

    The base has every linear module, the output embedding, and attention without the savings of the
    causal mask. The experts add A x and B z for the rows, and one gate for every expert.

    Args:
        plan: The plan, which names the modules.
        config: The configuration of the base.
        rows: The rows of A that are read per module.

    Returns:
        The multiply-adds of the base, and the added ones.
    """
    shapes = plan.base.shapes
    linears = sum(o * i for o, i in (shapes[name] for name in plan.parameters))
    head = shapes["lm_head.weight"][0] * shapes["lm_head.weight"][1]
    attention = 2 * TOKENS * config.hidden_size * config.num_hidden_layers
    added = sum(rows * (o + i) + EXPERTS * i for o, i in (shapes[n] for n in plan.parameters))
    return TOKENS * (linears + head + attention), TOKENS * added


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference.

    Args:
        a: A tensor.
        b: A tensor of the same shape.

    Returns:
        The difference.
    """
    return float((a - b).abs().max())


def parity(peer: Peer, base: Any, merged: Any, ids: Tensor, folder: Path) -> dict[str, float]:
    """Compare peft with eight active adapters of weight 1 with our `task_arithmetic` of scale 1.

    Args:
        peer: The process of peft.
        base: The bare model.
        merged: The merged model.
        ids: The token ids `[1, tokens]`.
        folder: A folder for peft's logits.

    Returns:
        The largest difference, the largest change by the experts, and the largest logit.
    """
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
    found = find(BASE, Session())
    with TemporaryDirectory() as name:
        folder = Path(name)
        experts = make_experts(folder / "experts", found)
        store, file = add_experts(folder, experts)
        peer = peft(options.cache, found.folder, experts)
        around = surroundings(peer.versions)
        recipe = {"base": BASE, "experts": [e.name for e in experts], "dtype": "float32"}
        registry = Registry.read(file)
        route = {"method": "phatgoose", "top_k": TOP_K}
        plan = resolve(Recipe.of(recipe | {"route": route}), session=Session(registry, store))
        base = load_model(found, "float32", "cpu")
        routed = compose(plan, model=base, session=Session(store=store)).model
        sums = recipe | {"merge": {"method": "task_arithmetic", "scale": 1.0}}
        merged = compose(sums, model=base, session=Session(registry, store)).model
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
    print("parity of peft with eight active adapters and task_arithmetic:", agreement)
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
