"""Run fusion_bench for the AdaMerging benchmark. `_peer.Peer` starts this script with its own interpreter.

The script reads one command per line from stdin and answers each with one line of JSON on stdout:

- `seconds WHAT` returns the median time of several steps.
- `peak WHAT` returns the peak of anonymous memory in bytes.
- `gradient FILE` writes the first gradient.

WHAT is `step`, `bare` or `bare together`. The step equals the one in
`fusion_bench/method/adamerging/layer_wise_adamerging.py` with the options of
`config/method/adamerging/clip.yaml`. The loop itself cannot be called without a Lightning fabric,
whose `backward` on a CPU calls that of the loss.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.models.wrappers.layer_wise_fusion import (
    LayerWiseMergedModel,
    get_layer_wise_weights,
)
from safetensors.torch import save_file
from transformers.utils import logging

sys.path.append(str(Path(__file__).parent))

from _unlabelled import (
    EXPERTS,
    INITIAL,
    RATE,
    REPEATS,
    TASKS,
    Problem,
    features,
    logits,
    peak,
    seconds,
    together,
)

PACKAGES = ("torch", "transformers", "fusion_bench")


class Learning:
    """The merged model and its optimiser, constructed as in fusion_bench.

    Args:
        problem: The problem of the benchmark.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.steps = problem, 0
        base = problem.model()
        self.names = [name for name, _ in base.named_parameters()]
        dtype = getattr(torch, problem.dtype)
        weights = get_layer_wise_weights(EXPERTS, len(self.names), INITIAL, dtype=dtype)
        finetuned = [self.finetuned(expert) for expert in range(EXPERTS)]
        options = {"clamp_weights": False, "tie_weights": True, "strict": False}
        self.module = LayerWiseMergedModel(weights, base, finetuned, **options)
        self.optimizer = torch.optim.Adam([self.module.merge_weight], lr=RATE)
        self.module.train()
        self.module.merge_weights()

    def finetuned(self, expert: int) -> Any:
        """Return the base plus a task vector, because fusion_bench subtracts the base again.

        Args:
            expert: The number of the expert.

        Returns:
            The model.
        """
        model, vector = self.problem.model(), self.problem.vector(expert)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += vector[name]
        return model

    def backward(self) -> None:
        """Compute the gradients of one step, task by task."""
        for task in range(TASKS):
            batch = self.problem.batch(task, self.steps)
            loss = entropy_loss(self.problem.logits(self.module, batch, task))
            loss.backward(retain_graph=True)

    def step(self) -> None:
        """Run one step: gradients, Adam, and the merge of the new weights."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.merge_weights()
        self.steps += 1

    def gradient(self) -> dict[str, torch.Tensor]:
        """Return the gradient of the initial coefficients, by parameter."""
        self.backward()
        found = self.module.merge_weight.grad
        return {name: found[:, place].clone() for place, name in enumerate(self.names)}


class Bare:
    """The bare model with gradients of all parameters, which no method that learns can undercut.

    Args:
        problem: The problem of the benchmark.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.model()

    def step(self) -> None:
        """Compute the gradients task by task."""
        for task in range(TASKS):
            found = self.problem.logits(self.model, self.problem.batch(task, 0), task)
            entropy_loss(found).backward()
        self.model.zero_grad()

    def together(self) -> None:
        """Compute the gradients with all tasks in one batch."""
        batches = [self.problem.batch(task, 0) for task in range(TASKS)]
        parts = features(self.model, together(batches)).tensor_split(TASKS)
        pairs = zip(parts, self.problem.heads, strict=True)
        sum(entropy_loss(logits(found, head)) for found, head in pairs).backward()
        self.model.zero_grad()


class Side:
    """The state between commands. Models are created when they are first needed.

    Args:
        *paths: The folder of the encoder and the folder of the problem.
    """

    def __init__(self, *paths: str) -> None:
        self.paths = [Path(path) for path in paths]
        self.problem = Problem(*self.paths)
        self.made: dict[type, Any] = {}

    def get(self, kind: type) -> Any:
        """Return the instance of a class, which is created once.

        Args:
            kind: `Learning` or `Bare`.

        Returns:
            The instance.
        """
        if kind not in self.made:
            self.made[kind] = kind(self.problem)
        return self.made[kind]

    def do(self, command: str) -> Any:
        """Answer one command.

        Args:
            command: The command.

        Returns:
            The answer, which can be written as JSON.
        """
        if command == "versions":
            return {name: version(name) for name in PACKAGES}
        if command.startswith("gradient "):
            save_file(Learning(Problem(*self.paths, "float64")).gradient(), command[9:])
            return None
        measure, _, what = command.partition(" ")
        calls = {
            "step": lambda: self.get(Learning).step(),
            "bare": lambda: self.get(Bare).step(),
            "bare together": lambda: self.get(Bare).together(),
        }
        if measure == "seconds":
            return median(seconds(calls[what]) for _ in range(REPEATS))
        return peak(lambda: [calls[what]() for _ in range(REPEATS)])


def main() -> None:
    """Answer commands until stdin ends. Only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    threads, *paths = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(*paths)
    for line in sys.stdin:
        print(json.dumps(side.do(line.rstrip("\n"))), file=answers, flush=True)


if __name__ == "__main__":
    main()
