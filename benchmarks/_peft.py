"""Run peft for the benchmarks. `_peer.Peer` starts this script with the interpreter of peft's environment.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
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
    """Load the base in float32, as peft's documentation does.

    Args:
        folder: The folder of the base.

    Returns:
        The model.
    """
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def adapt(model: Any, experts: list[str], **options: bool) -> PeftModel:
    """Load all experts onto a base that is already loaded.

    Args:
        model: The base.
        experts: The folders of the experts.
        **options: Further options of `PeftModel.from_pretrained`.

    Returns:
        The model with all adapters.
    """
    adapted = PeftModel.from_pretrained(model, experts[0], adapter_name="e0", **options)
    for number, folder in enumerate(experts[1:], 1):
        adapted.load_adapter(folder, adapter_name=f"e{number}", **options)
    return adapted.eval()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time a call.

    Args:
        call: The call to time.

    Returns:
        The seconds that it took, and its result.
    """
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class Side:
    """The state between commands: one base, and a second base with all experts.

    Args:
        base: The folder of the base.
        experts: The folders of the experts.
    """

    def __init__(self, base: str, experts: list[str]) -> None:
        self.base, self.experts = load(base), experts
        self.folder = base
        self.adapted: PeftModel | None = None
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def do(self, command: str) -> Any:
        """Answer one command.

        Args:
            command: `versions`, `load`, `input` with token ids, or a case of `forward`.

        Returns:
            The answer, which can be written as JSON.
        """
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
        """Time one forward pass.

        Args:
            which: The model: `base`, or the adapters, with `one` or `eight` of them active.
            file: The file that gets the logits, or an empty string.

        Returns:
            The time in seconds.

        Raises:
            ValueError: If no input was given before.
        """
        if self.adapted is None:
            raise ValueError("expected the command `input` first")
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
    """Answer commands until stdin ends. Only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    threads, base, *experts = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(base, experts)
    for line in sys.stdin:
        print(json.dumps(side.do(line.rstrip("\n"))), file=answers, flush=True)


if __name__ == "__main__":
    main()
