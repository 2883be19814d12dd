"""What the benchmarks share: options, random experts, rounds, and their statistics."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from experthub.hub import Store
from experthub.hub.bases.base import Base
from experthub.hub.files.atomic import hub_home
from safetensors.torch import save_file

BASE = "smollm2-135m-instruct"
THREADS, EXPERTS, RANK = 2, 8, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Times = dict[str, list[float]]


def arguments(description: str | None, **numbers: tuple[Sequence[int], str]) -> argparse.Namespace:
    """The options of every benchmark, and lists of numbers by name: their default, and what they are."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (at least 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument(
        "--cache",
        type=Path,
        default=hub_home() / "benchmarks",
        help="where the peer's virtual environment is kept ($HUB_HOME/benchmarks)",
    )
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=default, help=text)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("a median needs at least 5 rounds")
    return options


def make_experts(folder: Path, base: Base) -> list[Path]:
    """Random rank-8 LoRAs of all linear kinds with gates, small enough for sane logits."""
    kinds = tuple(f".{linear}.weight" for linear in LINEARS)
    modules = [name.removesuffix(".weight") for name in base.shapes if name.endswith(kinds)]
    folders = []
    for seed in range(EXPERTS):
        random = torch.Generator().manual_seed(seed)
        tensors, gates = {}, {}
        for module in modules:
            outputs, inputs = base.shapes[f"{module}.weight"]
            name = f"base_model.model.{module}.lora"
            a = torch.randn(RANK, inputs, generator=random)
            tensors[f"{name}_A.weight"] = a / inputs**0.5
            tensors[f"{name}_B.weight"] = 0.01 * torch.randn(outputs, RANK, generator=random)
            gates[f"{module}.gate"] = torch.randn(inputs, generator=random)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
        config |= {"target_modules": list(LINEARS), "bias": "none", "inference_mode": True}
        place = folder / f"expert-{seed}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        save_file(gates, place / "phatgoose_gates.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))
        folders.append(place)
    return folders


def add_experts(folder: Path, experts: list[Path]) -> tuple[Store, Path]:
    """A store under a folder that holds the experts, and the registry that names them."""
    store, registry = Store(folder / "store"), folder / "registry.yaml"
    entries = []
    for place in experts:
        digest, _ = store.add(place)
        entry = {"name": place.name, "base": BASE, "sources": [f"file:{place}"], "digest": digest}
        entries.append(entry)
    registry.write_text(json.dumps({"version": 1, "experts": entries}))  # JSON is YAML
    return store, registry


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """The call as a case: seconds, with the garbage of the last one collected before."""

    def seconds() -> float:
        gc.collect()
        start = time.perf_counter()
        result = call()
        taken = time.perf_counter() - start
        del result
        return taken

    return seconds


def run_rounds(cases: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Every case once per round, in turn (A B C A B C ...), after one round of warm-up."""
    times: Times = {name: [] for name in cases}
    for count in range(rounds + 1):
        for name, case in cases.items():
            seconds = case()
            if count:
                times[name].append(seconds)
        print(f"round {count} of {rounds}", file=sys.stderr)
    return times


def ratio(times: Times, name: str, to: str) -> float:
    """The median over rounds of the ratio of two cases in one round."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def spread(seconds: list[float]) -> str:
    """Median, smallest and largest, as a column of a table."""
    return f"{median(seconds):8.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def surroundings(peer_versions: dict[str, str]) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    ours = {name: version(name) for name in ("torch", "transformers")}
    load = [round(x, 2) for x in os.getloadavg()]
    machine = {"processors": os.cpu_count(), "threads": THREADS, "machine": platform.machine()}
    return machine | {"load_average": load, "ours": ours, "peer": peer_versions}


def finish(result: dict[str, Any], to: Path | None) -> None:
    """Write the result, with whether the peer stayed out of this process."""
    result["peft_imported_here"] = "peft" in sys.modules
    print(f"load average before: {result['surroundings']['load_average']}")
    if to:
        to.write_text(json.dumps(result, indent=2) + "\n")
