"""Run peft for the scale benchmark: many active adapters, adapters routed by Arrow, and Poly.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, PolyConfig, create_arrow_model, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parent))
from _answers import answer

SOME = 16  # the number of adapters that are active at once


class Side:
    """A base with all experts, adapted in one of peft's ways.

    Args:
        base: The folder of the base.
        experts: The folders of the experts.
    """

    def __init__(self, base: str, experts: list[str]) -> None:
        self.base, self.experts = base, experts
        self.ids = torch.zeros(1, 0, dtype=torch.long)
        self.model: Any = None
        self.more: dict[str, Any] = {}

    def do_versions(self) -> dict[str, str]:
        """Return the versions of the packages."""
        return {name: version(name) for name in ("torch", "transformers", "peft")}

    def do_input(self, *ids: str) -> None:
        """Set the input of the forward passes.

        Args:
            *ids: The token ids.
        """
        self.ids = torch.tensor([[int(token) for token in ids]])

    def do_load(self, way: str) -> float:
        """Time loading all experts onto a base that is already loaded.

        Args:
            way: `one` or `sixteen` for active adapters, `arrow`, or `poly`.

        Returns:
            The time in seconds.
        """
        self.model = None
        gc.collect()
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype="float32").eval()
        start = time.perf_counter()
        self.more = {}
        if way == "arrow":
            self.model = create_arrow_model(base, self.experts, ArrowConfig(top_k=2))
        elif way == "poly":
            self.model = self._poly(base)
        else:
            self.model = PeftModel.from_pretrained(base, self.experts[0], adapter_name="e0")
            for number, folder in enumerate(self.experts[1:], 1):
                self.model.load_adapter(folder, adapter_name=f"e{number}")
            active = 1 if way == "one" else SOME
            self.model.base_model.set_adapter([f"e{number}" for number in range(active)])
        self.model.eval()
        return time.perf_counter() - start

    def _poly(self, base: Any) -> Any:
        """Create a Poly model with as many random skills as experts: only its time counts."""
        config = json.loads(Path(self.experts[0], "adapter_config.json").read_text())
        self.more = {"task_ids": torch.zeros(1, dtype=torch.long)}
        poly = PolyConfig(
            r=config["r"],
            n_skills=len(self.experts),
            n_tasks=1,
            task_type="CAUSAL_LM",
            target_modules=config["target_modules"],
        )
        return get_peft_model(base, poly)

    def do_forward(self) -> float:
        """Time one forward pass in seconds, including the logits."""
        start = time.perf_counter()
        self.model(input_ids=self.ids, use_cache=False, **self.more)
        return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Answer commands until stdin ends."""
    logging.disable_progress_bar()
    threads, base, *experts = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(base, experts)
    answer(side)


if __name__ == "__main__":
    main()
