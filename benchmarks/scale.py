"""Measure 16 to 1,024 experts on SmolLM2-135M: packing, loading, one forward pass, decoding.

The experts have rank 8 and gates; each is a pair of the starter experts with added noise. The router is
phatgoose with top_k 2. The input has 512 tokens of text. The model runs in float32 with two threads and
computes all logits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _bench import BASE, LINEARS, Times, arguments, finish, ratio, run_rounds, spread, surroundings
from _many import RANK, many
from _peer import HERE, OFFLINE, Peer, environment
from experthub.hub import Registry, Store
from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.session import Session

COUNTS, TOKENS, TOP_K, STEPS = (16, 64, 128, 256, 1024), 512, 2, 16
WITH_PEERS = (16, 64)
ROUTE = '{"method": "phatgoose", "top_k": 2}'
FORWARD = {16: 1.5, 128: 2.3, 1024: 4.0}  # goals, relative to the base
DECODE = {16: 1.6}
LOAD = {1024: 2.0}
TEXT = HERE.parent / "docs" / "recipes.md"
PEERS = {
    "peft, one active": ("peft", "one"),
    "peft, sixteen active": ("peft", "sixteen"),
    "peft, Arrow": ("peft", "arrow"),
    "peft, Poly": ("peft", "poly"),
    "mttl, PHATGOOSE": ("mttl", "phatgoose"),
    "mttl, Arrow": ("mttl", "arrow"),
}


def bounds(base: Base, count: int) -> dict[str, float]:
    """Compute the bounds of an exact router that scores every expert, relative to the base.

    The bounds count the gates and the chosen experts. For `forward` they count multiply-adds, where
    the base includes attention and the output embedding. For `decode` they count bytes of weights,
    with the experts in bfloat16 and the rest in float32.

    Args:
        base: The base.
        count: The number of experts.

    Returns:
        The bounds of `forward` and `decode`.
    """
    shapes, kinds = base.shapes, tuple(f".{linear}.weight" for linear in LINEARS)
    linears = [shapes[name] for name in shapes if name.endswith(kinds)]
    weights = (
        sum(o * i for o, i in linears) + shapes["lm_head.weight"][0] * shapes["lm_head.weight"][1]
    )
    hidden, layers = shapes["lm_head.weight"][1], len(linears) // len(LINEARS)
    experts = sum(TOP_K * RANK * (o + i) for o, i in linears)
    gates = sum(count * i for _, i in linears)
    return {
        "forward": 1 + (experts + gates) / (weights + 2 * TOKENS * hidden * layers),
        "decode": 1 + (2 * experts + 4 * gates) / (4 * weights),
    }


def ours(store: Store, registry: Path, count: int) -> Peer:
    """Start `_scaled.py` in its own process.

    Args:
        store: The store of the experts.
        registry: The file of the registry.
        count: The number of experts.

    Returns:
        The process.
    """
    options = [str(store.root), registry, str(count), ROUTE]
    return Peer(Path(sys.executable), "_scaled.py", *options, variables={}, own=True)


def others(cache: Path, base: Path, folders: list[Path]) -> dict[str, tuple[Peer, float]]:
    """Start every case of the peers in its own process. A case that fails is left out.

    Args:
        cache: The folder of the virtual environments.
        base: The folder of the base.
        folders: The folders of the experts.

    Returns:
        The process of each case, and the seconds that it took to load.
    """
    pins = tuple(
        line
        for line in (HERE.parent / "tests" / "golden" / "mttl.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pythons = {
        "peft": environment(cache / "peft-venv", ("torch", "transformers", "peft")),
        "mttl": environment(cache / "mttl-venv", (), pins, whole=True),
    }
    found: dict[str, tuple[Peer, float]] = {}
    for name, (kind, way) in PEERS.items():
        script = "_peft_many.py" if kind == "peft" else "_mttl.py"
        peer = Peer(pythons[kind], script, base, *folders, variables=OFFLINE)
        try:
            found[name] = peer, peer.ask(f"load {way}")
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def folders_of(store: Store, registry: Registry, count: int, place: Path) -> list[Path]:
    """Copy the first experts out of the store, for the peers.

    Args:
        store: The store of the experts.
        registry: The registry that names them.
        count: The number of experts.
        place: The folder for the copies.

    Returns:
        The folders of the experts.
    """
    known = {expert.name: expert.digest for expert in registry.list_experts()}
    found = [place / f"expert-{number}" for number in range(count)]
    for folder in found:
        store.copy_out(known[folder.name], folder)
    return found


def measured(count: int, options: Any, base: Base, store: Store, file: Path) -> dict[str, Any]:
    """Measure everything for one number of experts.

    Args:
        count: The number of experts.
        options: The options of the benchmark.
        base: The base.
        store: The store of the experts.
        file: The file of the registry.

    Returns:
        The results.
    """
    with TemporaryDirectory() as place:
        side = ours(store, file, count)
        pack = side.ask("pack")
        load = run_rounds(
            {what: lambda w=what: side.ask(f"load {w}") for what in ("base", "routed", "resolve")},
            options.rounds,
        )
        side.close()
        side = ours(store, file, count)
        private = side.ask("keep " + " ".join(map(str, tokens(base))))
        peers: dict[str, tuple[Peer, float]] = {}
        if count in options.peers:
            folders = folders_of(store, Registry.read(file), count, Path(place))
            peers = others(options.cache, base.folder, folders)
        cases = {what: lambda w=what: side.ask(f"forward {w}") for what in ("base", "routed")}
        for name, (peer, _) in peers.items():
            peer.ask("input " + " ".join(map(str, tokens(base))))
            cases[name] = lambda p=peer: p.ask("forward")
        forward = run_rounds(cases, options.rounds)
        for peer, _ in peers.values():
            peer.close()
        decode = run_rounds(
            {what: lambda w=what: side.ask(f"decode {w} {STEPS}") for what in ("base", "routed")},
            options.rounds,
        )
        touched, kernels = side.ask("touched"), side.ask("kernels")
        side.close()
    return {
        "experts": count,
        "pack": pack,
        "load": load,
        "private_bytes": private,
        "forward": forward,
        "decode": decode,
        "touched": touched,
        "kernels": kernels,
        "bounds": bounds(base, count),
        "peers_load": {name: seconds for name, (_, seconds) in peers.items()},
    }


def tokens(base: Base) -> list[int]:
    """Tokenise the text of the input.

    Args:
        base: The base, whose tokenizer is used.

    Returns:
        The token ids.
    """
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(base.folder)(TEXT.read_text())["input_ids"]
    return ids[:TOKENS]


def show(found: dict[str, Any]) -> None:
    """Print the results for one number of experts.

    Args:
        found: The results.
    """
    count, bound = found["experts"], found["bounds"]
    pack, private = found["pack"], found["private_bytes"]
    size = f"{pack['bytes'] / 1e9:.2f} GB" if pack["bytes"] else "no bank, too few experts"
    print(
        f"\n{count} experts: packed in {pack['seconds']:.1f} s ({size}); private memory after loading:"
    )
    print(
        f"  {private['base'] / 1e6:.0f} MB base, {private['routed'] / 1e6:.0f} MB routed; ", end=""
    )
    print(f"some token chooses {100 * found['touched']:.0f} % of the experts (mean over modules)")
    print(f"  kernels: {found['kernels']}")
    goals = {"load": LOAD, "forward": FORWARD, "decode": DECODE}
    for what, goal in goals.items():
        times: Times = found[what]
        for name, seconds in times.items():
            line = f"  {what:8} {name:22} {spread(seconds):34} {ratio(times, name, 'base'):7.2f} x base"
            if name == "routed":
                line += f", bound {bound[what]:.2f}" if what in bound else ""
                line += f", goal {goal[count]}" if count in goal else ""
            print(line)
    for name, seconds in found["peers_load"].items():
        print(f"  load     {name:22} {seconds:8.3f} s (one run, onto a loaded base)")


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(
        __doc__,
        experts=(COUNTS, "numbers of experts to compose"),
        peers=(WITH_PEERS, "numbers of experts at which the peers run too"),
    )
    base = find(BASE, Session())
    folder = options.cache / "scale"
    store, file = many(folder, max(COUNTS))
    around = surroundings({})
    results = []
    for count in options.experts:
        results.append(measured(count, options, base, store, file))
        show(results[-1])
    finish({"benchmark": "scale", "surroundings": around, "results": results}, options.json)


if __name__ == "__main__":
    main()
