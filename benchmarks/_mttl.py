"""Run mttl for the scale benchmark: its PHATGOOSE and its Arrow over many experts of one base.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
Every linear module gets mttl's own container and selector, as mttl's `MultiExpertModel` does it.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
# These folders come last, because one of them holds another mttl.
sys.path += [str(HERE), str(HERE.parent / "tests" / "golden")]
from _answers import answer  # noqa: E402
from replacing import replace  # noqa: E402

ATTENTION = torch.nn.functional.scaled_dot_product_attention
replace()
from mttl.models.containers.lora_containers import LoRAExpertContainer  # noqa: E402
from mttl.models.containers.selectors import (  # noqa: E402
    ArrowSelectorConfig,
    PhatgooseSelectorConfig,
)
from mttl.models.containers.selectors.base import get_selector  # noqa: E402
from mttl.models.expert_context import InfoContainer  # noqa: E402
from mttl.models.library.expert import Expert, ExpertInfo  # noqa: E402
from mttl.models.library.library_transforms import ArrowTransform  # noqa: E402
from mttl.models.modifiers.lora import LoRAConfig  # noqa: E402
from mttl.models.modifiers.routing import RoutingInfo  # noqa: E402

LORA = "base_model.model.{}.lora_{}.weight"

# mttl replaces this function by an older one, so it is put back.
torch.nn.functional.scaled_dot_product_attention = ATTENTION


class Side:
    """A base with all experts and one of mttl's selectors at every linear module.

    Args:
        base: The folder of the base.
        experts: The folders of the experts.
    """

    def __init__(self, base: str, experts: list[Path]) -> None:
        self.base, self.experts = base, experts
        self.ids = torch.zeros(1, 0, dtype=torch.long)
        self.model: Any = None

    def do_versions(self) -> dict[str, str]:
        """Return the versions of the packages."""
        return {name: version(name) for name in ("torch", "transformers", "mttl")}

    def do_input(self, *ids: str) -> None:
        """Set the input of the forward passes.

        Args:
            *ids: The token ids.
        """
        self.ids = torch.tensor([[int(token) for token in ids]])

    def do_load(self, method: str) -> float:
        """Time wrapping the linear modules of an already loaded base with all experts.

        Args:
            method: `phatgoose` or `arrow`.

        Returns:
            The time in seconds.
        """
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype="float32").eval()
        start = time.perf_counter()
        weights = [load_file(folder / "adapter_model.safetensors") for folder in self.experts]
        gates = [load_file(folder / "phatgoose_gates.safetensors") for folder in self.experts]
        for name in [n.removesuffix(".gate") for n in gates[0]]:
            self._surround(name, method, weights, gates)
        return time.perf_counter() - start

    def _surround(self, name: str, method: str, weights: list[Any], gates: list[Any]) -> None:
        a = [own[LORA.format(name, "A")].float().T for own in weights]
        b = [own[LORA.format(name, "B")].float().T for own in weights]
        rank = a[0].shape[1]
        config = LoRAConfig(lora_rank=rank, lora_alpha=rank)
        made = LoRAExpertContainer(
            config, self.model.get_submodule(name), lora_merge_after=method == "phatgoose"
        )
        made.__layer_name__ = name
        for number, (own_a, own_b) in enumerate(zip(a, b, strict=True)):
            info = ExpertInfo(f"expert_{number}", expert_config=config)
            made.add_expert(Expert(info, {f"{name}.lora_a": own_a, f"{name}.lora_b": own_b}))
        if method == "phatgoose":
            selector = PhatgooseSelectorConfig(selector_logging=False)
            probes = torch.stack([own[f"{name}.gate"].float() for own in gates])
        else:
            selector, arrow = ArrowSelectorConfig(selector_logging=False), ArrowTransform()
            pairs = zip(a, b, strict=True)
            probes = torch.stack([arrow._low_rank_svd(x, y)[0][:, 0] for x, y in pairs])
        made.assign_selector(get_selector(selector, layer=made.layer))
        made.selector.overwrite_prototypes(probes)
        self.model.set_submodule(name, made)

    def do_forward(self) -> float:
        """Time one forward pass in seconds, including the logits."""
        start = time.perf_counter()
        with InfoContainer(None, RoutingInfo(task_names=["unknown"])):
            self.model(input_ids=self.ids, use_cache=False)
        return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Answer commands until stdin ends."""
    logging.disable_progress_bar()
    getLogger("mttl").setLevel(ERROR)  # it warns about every vector with another sign
    threads, base, *experts = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(base, [Path(folder) for folder in experts])
    answer(side)


if __name__ == "__main__":
    main()
