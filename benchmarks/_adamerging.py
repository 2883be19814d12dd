"""Run our side of the AdaMerging benchmark in its own process, like the peer's side.

The script reads one command per line from stdin and answers each with one line of JSON on stdout:

- `seconds WHAT` returns the median time of several steps.
- `peak WHAT` returns the peak of anonymous memory in bytes.
- `gradient FILE` writes the first gradient.

WHAT is `step`, `halves` (task vectors in bfloat16) or `lora` (as many LoRAs instead).
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
from experthub.merge import (
    Delta,
    Dense,
    Fit,
    LowRank,
    MergeMaterials,
    TaskVector,
    learn_coefficients,
)
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
    """The unlabelled inputs of all tasks, which the encoder reads in one batch.

    Args:
        problem: The problem of the benchmark.
        sizes: The number of inputs of each task.
    """

    labels = held_out = real = None

    def __init__(self, problem: Problem, sizes: int) -> None:
        self.problem, self.model = problem, problem.model()
        self.tasks = [str(task) for task in range(TASKS)]
        self.sizes = [sizes] * TASKS

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        """Compute the logits of some inputs of every task.

        Args:
            rows: The places of the inputs, for each task.
            view: This argument is ignored.

        Returns:
            The logits `[inputs, classes]` of each task.
        """
        pairs = zip(self.problem.inputs, rows, strict=True)
        batch = together([{k: v[r] for k, v in inputs.items()} for inputs, r in pairs])
        parts = features(self.model, batch).split([len(r) for r in rows])
        return [logits(found, h) for found, h in zip(parts, self.problem.heads, strict=True)]


def loras(problem: Problem) -> list[TaskVector]:
    """Create random LoRAs on all linear layers that the embedding passes through.

    Args:
        problem: The problem of the benchmark.

    Returns:
        A task vector for each expert.
    """
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
    """Return the dense task vectors, which are read from their files on demand.

    Args:
        problem: The problem of the benchmark.

    Returns:
        A task vector for each expert.
    """

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
    """Learn coefficients with some steps of layer-wise AdaMerging. This is the call that is measured.

    Args:
        problem: The problem of the benchmark.
        inputs: The unlabelled inputs.
        steps: The number of steps.
        what: `step`, `halves` or `lora`.
        **ports: Callbacks for progress and for the state of the optimiser.

    Returns:
        The learned coefficients.
    """
    halves = what == "halves"
    fit = Fit(
        "entropy", "layer", start=INITIAL, steps=steps, lr=RATE, batch_size=INPUTS, halves=halves
    )
    given = loras(problem) if what == "lora" else vectors(problem)
    materials = MergeMaterials(given, torch.ones(len(given)), inputs, **ports)
    return learn_coefficients(materials, fit)


def step_seconds(problem: Problem, what: str) -> float:
    """Time a step from the end of the one before it, so that the preparation does not count.

    Args:
        problem: The problem of the benchmark.
        what: `step`, `halves` or `lora`.

    Returns:
        The median time in seconds.
    """
    ends: list[float] = []
    inputs = Inputs(problem, len(problem.inputs[0]["input_ids"]))
    fitted(problem, inputs, REPEATS + 1, what, report=lambda *_: ends.append(time.perf_counter()))
    return median(b - a for a, b in pairwise(ends))


def gradient(problem: Problem) -> dict[str, Tensor]:
    """Return the gradient of the initial coefficients, computed from Adam's first mean, a tenth of it.

    Args:
        problem: The problem of the benchmark.

    Returns:
        The gradient of the experts' coefficients, by parameter.
    """
    states: list[Any] = []
    found = fitted(problem, Inputs(problem, INPUTS), 1, save=states.append)
    columns = zip(found.blocks, (states[-1]["exp_avg"] / 0.1).T, strict=True)
    return {name: column.contiguous() for name, column in columns}


def do(paths: list[Path], command: str) -> Any:
    """Answer one command.

    Args:
        paths: The folder of the encoder and the folder of the problem.
        command: The command.

    Returns:
        The answer, which can be written as JSON.
    """
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
    """Answer commands until stdin ends. Only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    threads, *paths = sys.argv[1:]
    torch.set_num_threads(int(threads))
    for line in sys.stdin:
        answer = do([Path(path) for path in paths], line.rstrip("\n"))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
