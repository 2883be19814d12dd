"""Write mttl.json: what mttl's selectors and LoRA containers do to a tiny linear module.

    python -m venv ENV && ENV/bin/pip install --no-deps -r tests/golden/mttl.txt
    ENV/bin/python tests/golden/mttl.py

PHATGOOSE mixes after the experts and Arrow before, as its configurations say; the container takes
that as an argument of its own, and reads no configuration for it.  In float64, but for weights
over all experts, which its selector makes in float32.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  before anything is replaced: it looks for what is installed
from replacing import replace
from routed import EXPERTS, INPUTS, OUTPUTS, RANK, make_case, write
from torch import Tensor, nn

COMMAND = "python tests/golden/mttl.py"
ALPHA = 2.0
here = Path(__file__).resolve().parent  # where "mttl" is this script
sys.path = [entry for entry in sys.path if Path(entry).resolve() != here]
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


def container(linear: nn.Module, case: dict[str, Any], count: int, merge_after: bool) -> Any:
    """mttl's container of some experts around a linear module."""
    config = LoRAConfig(lora_rank=RANK, lora_alpha=ALPHA)
    made = LoRAExpertContainer(config, linear, lora_merge_after=merge_after)
    made.__layer_name__ = "linear"
    for number in range(count):
        weights = {"linear.lora_a": case["a"][number].T, "linear.lora_b": case["b"][number].T}
        info = ExpertInfo(f"expert_{number}", expert_config=config)
        made.add_expert(Expert(info, weights))
    return made.double()


def run(made: Any, config: Any, prototypes: Tensor, x: Tensor) -> dict[str, Any]:
    """The dense weights and the output with one of mttl's selectors."""
    made.assign_selector(get_selector(config, layer=made.layer).double())
    made.selector.overwrite_prototypes(prototypes)
    with InfoContainer(None, RoutingInfo(task_names=["unknown"])):
        found = made.selector(x, container=made)
        output = made(x)
    weights = found.weights
    if isinstance(found.experts, Tensor):
        zeros = weights.new_zeros(*x.shape[:2], len(prototypes))
        weights = zeros.scatter(-1, found.experts, weights)
    return {"weights": weights, "output": output}


def main() -> None:
    """Write the file next to this script."""
    case = make_case()
    linear = nn.Linear(INPUTS, OUTPUTS).double()
    linear.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    arrow = ArrowTransform()
    pairs = zip(case["a"], case["b"], strict=True)
    prototypes = torch.stack([arrow._low_rank_svd(a.T, b.T)[0][:, 0] for a, b in pairs])
    cases: list[dict[str, Any]] = []
    for count in EXPERTS:
        top_k = min(PhatgooseSelectorConfig.top_k, count)
        phatgoose = PhatgooseSelectorConfig(selector_logging=False, top_k=top_k)
        made = container(linear, case, count, merge_after=True)
        found = run(made, phatgoose, case["gates"][:count], case["x"])
        cases.append({"method": "phatgoose", "experts": count, **found})
        made = container(linear, case, count, merge_after=False)
        found = run(
            made, ArrowSelectorConfig(selector_logging=False), prototypes[:count], case["x"]
        )
        cases.append({"method": "arrow", "experts": count, **found})
    written_by = {name: version(name) for name in ("mttl", "torch")} | {"command": COMMAND}
    write(__file__, written_by, case | {"alpha": ALPHA, "prototypes": prototypes}, cases)


if __name__ == "__main__":
    with torch.no_grad():
        main()
