"""fusion_bench's side of the AdaMerging benchmark; run by `_peer.Peer` with its own interpreter.

Reads one command a line from stdin, and answers each with one line of JSON on stdout:
`seconds` or `peak` with what is measured, `step`, `bare` or `bare together`: seconds of one, the
median of several, or bytes of anonymous memory; and `gradient FILE`.

The step is that of `fusion_bench/method/adamerging/layer_wise_adamerging.py` with the options of its
`config/method/adamerging/clip.yaml`. Its loop itself cannot be called without a Lightning fabric,
whose `backward` on a CPU is the loss's own.
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
    """The merged model and its optimiser, as fusion_bench constructs them."""

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
        """The base with a task vector added, which fusion_bench takes off again."""
        model, vector = self.problem.model(), self.problem.vector(expert)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += vector[name]
        return model

    def backward(self) -> None:
        for task in range(TASKS):
            batch = self.problem.batch(task, self.steps)
            loss = entropy_loss(self.problem.logits(self.module, batch, task))
            loss.backward(retain_graph=True)

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.merge_weights()
        self.steps += 1

    def gradient(self) -> dict[str, torch.Tensor]:
        """Of the initial coefficients, by parameter."""
        self.backward()
        found = self.module.merge_weight.grad
        return {name: found[:, place].clone() for place, name in enumerate(self.names)}


class Bare:
    """A model of which every parameter takes its gradient: what no method that learns can go below."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.model()

    def step(self) -> None:
        for task in range(TASKS):
            found = self.problem.logits(self.model, self.problem.batch(task, 0), task)
            entropy_loss(found).backward()
        self.model.zero_grad()

    def together(self) -> None:
        """All tasks in one batch."""
        batches = [self.problem.batch(task, 0) for task in range(TASKS)]
        parts = features(self.model, together(batches)).tensor_split(TASKS)
        pairs = zip(parts, self.problem.heads, strict=True)
        sum(entropy_loss(logits(found, head)) for found, head in pairs).backward()
        self.model.zero_grad()


class Side:
    """The state between commands; models are made when they are first asked for."""

    def __init__(self, *paths: str) -> None:
        self.paths = [Path(path) for path in paths]
        self.problem = Problem(*self.paths)
        self.made: dict[type, Any] = {}

    def get(self, kind: type) -> Any:
        if kind not in self.made:
            self.made[kind] = kind(self.problem)
        return self.made[kind]

    def do(self, command: str) -> Any:
        """The answer to one command."""
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
    """Answer until stdin ends; only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    threads, *paths = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(*paths)
    for line in sys.stdin:
        print(json.dumps(side.do(line.rstrip("\n"))), file=answers, flush=True)


if __name__ == "__main__":
    main()
