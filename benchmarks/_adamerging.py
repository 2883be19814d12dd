"""Our side of the AdaMerging benchmark, in a process of its own as the peer's is.

Reads one command a line from stdin, and answers each with one line of JSON on stdout:
`seconds WHAT`, the median of several; `peak WHAT`, bytes of anonymous memory; and `gradient FILE`.
WHAT is `step`; `halves`, with task vectors in bfloat16; or `lora`, with as many LoRAs in their place.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from experthub.merge import Delta, Dense, Fit, Learner, LowRank, TaskVector, learn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

sys.path.append(str(Path(__file__).parent))

from _unlabelled import (
    EXPERTS,
    INITIAL,
    INPUTS,
    RATE,
    REPEATS,
    TASKS,
    Problem,
    features,
    logits,
    peak,
    together,
)

RANK = 4


class Inputs:
    """The unlabelled inputs of all tasks, which the encoder reads in one batch."""

    labels = held_out = real = None

    def __init__(self, problem: Problem, sizes: int) -> None:
        self.problem, self.model = problem, problem.model()
        self.tasks = [str(task) for task in range(TASKS)]
        self.sizes = [sizes] * TASKS

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        pairs = zip(self.problem.inputs, rows, strict=True)
        batch = together([{k: v[r] for k, v in inputs.items()} for inputs, r in pairs])
        parts = features(self.model, batch).split([len(r) for r in rows])
        return [logits(found, h) for found, h in zip(parts, self.problem.heads, strict=True)]


def loras(problem: Problem) -> list[TaskVector]:
    """Random LoRAs of all linear layers that the encoder's embedding passes through."""
    model, random = problem.model(), torch.Generator().manual_seed(0)
    linears = {
        f"{name}.weight": module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("pooler")
    }

    def change(outputs: int, inputs: int) -> Delta:
        a, b = (
            torch.randn(RANK, inputs, generator=random),
            torch.randn(outputs, RANK, generator=random),
        )
        return LowRank(a * 0.01, b * 0.1)

    found = [{n: change(*shape) for n, shape in linears.items()} for _ in range(EXPERTS)]
    return [TaskVector("base", {n: (lambda d=d: d) for n, d in own.items()}) for own in found]


def vectors(problem: Problem) -> list[TaskVector]:
    """The task vectors, read from their files when they are asked for."""

    def change(file: Path, name: str) -> Dense:
        with safe_open(file, framework="pt") as tensors:
            return Dense(tensors.get_tensor(name).to(getattr(torch, problem.dtype)))

    found = []
    for expert in range(EXPERTS):
        file = problem.folder / f"expert-{expert}.safetensors"
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        found.append(TaskVector("base", {name: partial(change, file, name) for name in names}))
    return found


def fitted(
    problem: Problem, inputs: Inputs, steps: int, what: str = "step", **ports: Callable[..., Any]
) -> Any:
    """The coefficients of some steps of layer-wise AdaMerging; the one call that is measured."""
    halves = what == "halves"
    fit = Fit(
        "entropy", "layer", start=INITIAL, steps=steps, lr=RATE, batch_size=INPUTS, halves=halves
    )
    given = loras(problem) if what == "lora" else vectors(problem)
    return learn(given, Learner(inputs, **ports), fit)


def step_seconds(problem: Problem, what: str) -> float:
    """From the end of a step to that of the next, without what comes before the first."""
    ends: list[float] = []
    inputs = Inputs(problem, len(problem.inputs[0]["input_ids"]))
    fitted(problem, inputs, REPEATS + 1, what, report=lambda *_: ends.append(time.perf_counter()))
    return median(b - a for a, b in pairwise(ends))


def gradient(problem: Problem) -> dict[str, Tensor]:
    """Of the initial coefficients, by parameter: Adam's first mean is a tenth of it."""
    states: list[Any] = []
    found = fitted(problem, Inputs(problem, INPUTS), 1, save=states.append)
    columns = zip(found.blocks, (states[-1]["exp_avg"] / 0.1).T, strict=True)
    return {name: column.contiguous() for name, column in columns}


def do(paths: list[Path], command: str) -> Any:
    """The answer to one command."""
    if command == "versions":
        return {name: version(name) for name in ("torch", "transformers", "experthub")}
    if command.startswith("gradient "):
        save_file(gradient(Problem(*paths, "float64")), command[9:])
        return None
    problem = Problem(*paths)
    measure, what = command.split()
    if measure == "seconds":
        return step_seconds(problem, what)
    inputs = Inputs(problem, len(problem.inputs[0]["input_ids"]))
    return peak(lambda: fitted(problem, inputs, REPEATS, what))


def main() -> None:
    """Answer until stdin ends; only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    threads, *paths = sys.argv[1:]
    torch.set_num_threads(int(threads))
    for line in sys.stdin:
        answer = do([Path(path) for path in paths], line.rstrip("\n"))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
