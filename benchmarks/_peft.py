"""peft's side of the benchmarks; run by `_peer.Peer` with the interpreter of peft's own environment.

Reads one command a line from stdin, and answers each with one line of JSON on stdout.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(folder: str) -> Any:
    """The base in float32, as peft's own documentation loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def adapt(model: Any, experts: list[str], **options: bool) -> PeftModel:
    """All experts loaded onto an already loaded base."""
    adapted = PeftModel.from_pretrained(model, experts[0], adapter_name="e0", **options)
    for number, folder in enumerate(experts[1:], 1):
        adapted.load_adapter(folder, adapter_name=f"e{number}", **options)
    return adapted.eval()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call took, and its result."""
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class Side:
    """The state between commands: one base, and one model with all experts on another."""

    def __init__(self, base: str, experts: list[str]) -> None:
        self.base, self.experts = load(base), experts
        self.folder = base
        self.adapted: PeftModel | None = None
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def do(self, command: str) -> Any:
        """The answer to one command."""
        word, _, argument = command.partition(" ")
        if word == "versions":
            return {"torch": torch.__version__, "peft": peft.__version__} | {
                "transformers": transformers.__version__
            }
        if word == "load":
            options = {"low_cpu_mem_usage": True} if argument else {}
            taken, adapted = seconds(lambda: adapt(self.base, self.experts, **options))
            self.base = adapted.unload()
            return taken
        if word == "input":
            self.ids = torch.tensor([json.loads(argument)])
            self.adapted = adapt(load(self.folder), self.experts)
            return None
        return self.forward(word, argument)

    def forward(self, which: str, file: str) -> float:
        """Seconds of one forward with `base`, `one` or `eight` active; logits go to the file."""
        if self.adapted is None:
            raise ValueError("expected an input first")
        model: Any = self.base
        if which != "base":
            names = [f"e{number}" for number in range(len(self.experts))]
            self.adapted.base_model.set_adapter(names[:1] if which == "one" else names)
            model = self.adapted
        with torch.no_grad():
            taken, out = seconds(lambda: model(input_ids=self.ids, use_cache=False).logits)
        if file:
            torch.save(out, file)
        return taken


def main() -> None:
    """Answer until stdin ends; only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    threads, base, *experts = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(base, experts)
    for line in sys.stdin:
        print(json.dumps(side.do(line.rstrip("\n"))), file=answers, flush=True)


if __name__ == "__main__":
    main()
