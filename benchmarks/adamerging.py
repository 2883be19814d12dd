"""Measure time and memory of a step of layer-wise AdaMerging: experthub, fusion_bench, the bare model.

The base is all-MiniLM-L6-v2 in float32, with eight dense task vectors of all its parameters and two
threads. A step reads sixteen inputs of 32 tokens for each of eight tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from _bench import Times, arguments, finish, ratio, run_rounds, spread, surroundings
from _peer import HERE, Peer, environment
from _unlabelled import EXPERTS, INPUTS, TASKS, TOKENS, write
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.session import Session
from safetensors.torch import load_file

BASE = "all-minilm-l6-v2"
PROCESSES = 3  # memory is measured in several processes, because allocators differ by some percent
REQUIREMENTS = HERE.parent / "tests" / "golden" / "fusion_bench.txt"
OURS, THEIRS, BARE, TOGETHER = (
    "experthub, step",
    "fusion_bench, step",
    "bare, task by task",
    "bare, all tasks at once",
)
HALVES, LORAS = "experthub, halves: true", "experthub, eight LoRAs"
OWN = {OURS: "step", HALVES: "halves", LORAS: "lora"}
COMMANDS = {**OWN, THEIRS: "step", BARE: "bare", TOGETHER: "bare together"}


def pins() -> tuple[str, ...]:
    """Read the requirements of fusion_bench's environment."""
    lines = REQUIREMENTS.read_text().splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def memory(start: Callable[[str], Peer]) -> dict[str, list[int]]:
    """Measure the peak of anonymous memory of each case, in processes that do nothing else.

    Args:
        start: A function that starts the process of a case.

    Returns:
        The bytes of each case, one value per process.
    """
    found: dict[str, list[int]] = {case: [] for case in COMMANDS}
    for case, what in [*COMMANDS.items()] * PROCESSES:
        side = start(case)
        found[case].append(int(side.ask(f"peak {what}")))
        side.close()
    return found


def parity(sides: dict[str, Peer], folder: Path) -> dict[str, float]:
    """Compare the gradients of the initial coefficients on both sides, in float64.

    Args:
        sides: The processes of both sides, by case.
        folder: A folder for the files.

    Returns:
        The largest difference and the largest gradient.

    Raises:
        RuntimeError: If the sides have coefficients of different parameters.
    """
    found = {}
    for case in (OURS, THEIRS):
        file = folder / "gradient.safetensors"
        sides[case].ask(f"gradient {file}")
        found[case] = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if found[OURS].keys() != found[THEIRS].keys():
        raise RuntimeError("the sides have coefficients of different parameters")
    pairs = [(found[OURS][name], tensor) for name, tensor in found[THEIRS].items()]
    return {
        "max_abs_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "max_abs_gradient": max(float(b.abs().max()) for _, b in pairs),
    }


def report(times: Times, bytes_of: dict[str, float]) -> None:
    """Print the table.

    Args:
        times: The seconds of each case.
        bytes_of: The peak of memory of each case.
    """
    head = "median (smallest to largest)"
    print(f"{'':24} {head:32} {'x task by task':>14} {'x at once':>10} {'peak':>8}")
    for case, seconds in times.items():
        print(
            f"{case:24} {spread(seconds):32} {ratio(times, case, BARE):14.3f} "
            f"{ratio(times, case, TOGETHER):10.3f} {bytes_of[case] / 1e6:5.0f} MB"
        )
    print(f"a step of fusion_bench takes {ratio(times, THEIRS, OURS):.2f} times as long as ours")
    for case in (*OWN, THEIRS):
        above = [(bytes_of[case] - bytes_of[bare]) / 1e6 for bare in (BARE, TOGETHER)]
        print(f"{case}: {above[0]:.0f} MB above {BARE}, {above[1]:.0f} MB above {TOGETHER}")


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments(__doc__)
    folder_of = options.cache / "fusion_bench-venv"
    python = {THEIRS: environment(folder_of, (), pins(), whole=True), OURS: Path(sys.executable)}
    base = find(BASE, Session())
    model = load_model(base, "float32", "cpu")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    del model
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, shapes, width, vocabulary)

        def start(case: str) -> Peer:
            side = OURS if case in OWN else THEIRS
            script = "_adamerging.py" if side == OURS else "_fusion_bench.py"
            return Peer(python[side], script, base.folder, folder)

        sides = {case: start(case) for case in (OURS, THEIRS)}
        around: dict[str, Any] = surroundings(sides[THEIRS].versions)
        agreement = parity(sides, folder)
        peaks = memory(start)
        cases: dict[str, Callable[[], float]] = {
            case: partial(sides[OURS if case in OWN else THEIRS].ask, f"seconds {what}")
            for case, what in COMMANDS.items()
        }
        times = run_rounds(cases, options.rounds)
        for side in sides.values():
            side.close()
    report(times, {case: median(found) for case, found in peaks.items()})
    print("parity of the first gradient in float64:", agreement)
    result = {
        "benchmark": "adamerging",
        "surroundings": around,
        "problem": {"experts": EXPERTS, "tasks": TASKS, "inputs": INPUTS, "tokens": TOKENS},
        "seconds": times,
        "median_seconds": {case: median(seconds) for case, seconds in times.items()},
        "ratio_to_bare": {case: ratio(times, case, BARE) for case in times},
        "ratio_to_bare_at_once": {case: ratio(times, case, TOGETHER) for case in times},
        "peak_bytes": peaks,
        "parity": agreement,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
