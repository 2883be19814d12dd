"""Shared parts of the benchmarks: options, random experts, rounds, and statistics."""

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
    """Parse the options that every benchmark has, and further options with lists of numbers.

    Args:
        description: The text that `--help` shows.
        **numbers: The default and the help text of each further option.

    Returns:
        The parsed options.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument(
        "--cache",
        type=Path,
        default=hub_home() / "benchmarks",
        help="folder of the peers' virtual environments (default: $HUB_HOME/benchmarks)",
    )
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=default, help=text)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("a median needs at least 5 rounds; pass --rounds 5 or more")
    return options


def make_experts(folder: Path, base: Base) -> list[Path]:
    """Write random LoRAs with gates on every linear module, small enough for sane logits.

    Args:
        folder: The folder under which every expert gets a folder.
        base: The base that the experts fit.

    Returns:
        The folders of the experts.
    """
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
    """Create a store that holds the experts, and a registry that names them.

    Args:
        folder: The folder for the store and the registry.
        experts: The folders of the experts.

    Returns:
        The store, and the path of the registry.
    """
    store, registry = Store(folder / "store"), folder / "registry.yaml"
    entries = []
    for place in experts:
        digest, _ = store.add(place)
        entry = {"name": place.name, "base": BASE, "sources": [f"file:{place}"], "digest": digest}
        entries.append(entry)
    registry.write_text(json.dumps({"version": 1, "experts": entries}))  # JSON is valid YAML
    return store, registry


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that times a call in seconds.

    Garbage is collected before the call, so that a call does not pay for the one before it.

    Args:
        call: The call to time.

    Returns:
        A function that calls it and returns the seconds it took.
    """

    def seconds() -> float:
        gc.collect()
        start = time.perf_counter()
        result = call()
        taken = time.perf_counter() - start
        del result
        return taken

    return seconds


def run_rounds(cases: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Run every case once per round, in turn (A B C A B C ...), after one round of warm-up.

    Args:
        cases: For each case, a function that returns the seconds it took.
        rounds: The number of rounds that count.

    Returns:
        The seconds of each case, one value per round.
    """
    times: Times = {name: [] for name in cases}
    for count in range(rounds + 1):
        for name, case in cases.items():
            seconds = case()
            if count:
                times[name].append(seconds)
        print(f"round {count} of {rounds}", file=sys.stderr)
    return times


def ratio(times: Times, name: str, to: str) -> float:
    """Return the median over rounds of the ratio of two cases within a round.

    Args:
        times: The seconds of each case.
        name: The case in the numerator.
        to: The case in the denominator.

    Returns:
        The median ratio.
    """
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def spread(seconds: list[float]) -> str:
    """Format the median, the smallest and the largest time as a cell of a table.

    Args:
        seconds: The times of one case.

    Returns:
        The text of the cell.
    """
    return f"{median(seconds):8.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def surroundings(peer_versions: dict[str, str]) -> dict[str, Any]:
    """Describe the machine, its load and the versions, on which the times depend.

    Args:
        peer_versions: The versions of the peer's packages.

    Returns:
        The description, as it stands in the JSON file.
    """
    ours = {name: version(name) for name in ("torch", "transformers")}
    load = [round(x, 2) for x in os.getloadavg()]
    machine = {"processors": os.cpu_count(), "threads": THREADS, "machine": platform.machine()}
    return machine | {"load_average": load, "ours": ours, "peer": peer_versions}


def finish(result: dict[str, Any], to: Path | None) -> None:
    """Write the result, and record whether peft was imported into this process.

    Args:
        result: The result of a benchmark.
        to: The JSON file to write, if any.
    """
    result["peft_imported_here"] = "peft" in sys.modules
    print(f"load average before: {result['surroundings']['load_average']}")
    if to:
        to.write_text(json.dumps(result, indent=2) + "\n")
