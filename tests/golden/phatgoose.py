"""Write phatgoose.json: what the authors' own modules of PHATGOOSE do to a tiny linear module.

    git clone https://github.com/r-three/phatgoose FOLDER && git -C FOLDER checkout fd4498f
    python -m venv ENV && ENV/bin/pip install -r tests/golden/phatgoose.txt
    ENV/bin/python tests/golden/phatgoose.py FOLDER

`Router` and `FFNExperts` of `src/models/addons/moe.py`, with the settings of
`colm/models/t5xl/moe_lora_rank16_a2.gin` and top-2 routing by token; in float64.  The numbers were
written with a copy of that file in which the branches that no case here reaches raise an error.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import gin
import torch
from routed import EXPERTS, INPUTS, OUTPUTS, RANK, TOP_K, make_case, write
from torch import Tensor, nn

COMMIT = "fd4498f3e0bb75a9a6b2867ce7ac8886876e5236"
COMMAND = "python tests/golden/phatgoose.py FOLDER"
READ, WRITTEN = ("linear", "pre_expose_hiddens", "hidden"), ("linear", "router", "encoder")


def imported(folder: str) -> Any:
    """The module, without what the packages around it import: data sets, trainers."""
    for name in ("src", "src.models", "src.models.addons", "src.utils"):
        package = ModuleType(name)
        package.__path__ = [f"{folder}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    return import_module("src.models.addons.moe")


def router(moe: Any, link: Any, gates: Tensor, shared: dict[Any, Any]) -> Any:
    """The authors' router over gates `[E, I]`."""
    link.extend(len(gates), "expert")
    made = moe.Router(None, shared, READ, WRITTEN, link, INPUTS).double()
    made.extend(len(gates))
    for number, gate in enumerate(gates):
        getattr(made, f"expert_embeddings_expert_{number}").data = gate
    return made


def experts(
    moe: Any, link: Any, a: Tensor, b: Tensor, shared: dict[Any, Any], **settings: Any
) -> Any:
    """The authors' experts with A `[E, R, I]` and B `[E, O, R]`."""
    shape = {"d_in": a.shape[2], "d_out": b.shape[1], "d_bottleneck": a.shape[1]}
    fixed = {"non_linearity": "identity", "divide_by_d_bottleneck": True}
    made = moe.FFNExperts(None, shared, WRITTEN, link, **shape, **fixed, **settings).double()
    made.extend(len(a))
    for number, (a_RI, b_OR) in enumerate(zip(a, b, strict=True)):
        getattr(made, f"layer1_expert_{number}").data = a_RI.T
        getattr(made, f"layer2_expert_{number}").data = b_OR.T
    return made


def around(linear: nn.Module, addons: list[Any], x: Tensor) -> Tensor:
    """Compute the output of a module with addons before and after it."""
    for addon in addons:
        addon.pre_forward(x)
    y = linear(x)
    for addon in addons:
        if addon.has_post_forward:
            y = addon.post_forward(y)[0]
    return y


def scores(made: Any, x: Tensor) -> Tensor:
    """Return the input of the router's softmax."""
    seen, softmax = [], torch.softmax
    try:
        torch.softmax = lambda given, dim: seen.append(given) or softmax(given, dim)
        made._forward(x)
    finally:
        torch.softmax = softmax
    return seen[0]


def run(moe: Any, linear: nn.Module, case: dict[str, Any], count: int) -> dict[str, Any]:
    """Scores, weights before and after the cut to the top k, and outputs for some of the experts."""
    link, x = moe.MoELink(), case["x"]
    shared: dict[Any, Any] = {READ: x}
    routed = router(moe, link, case["gates"][:count], shared)
    cut = {"normalize_topk": True, "topk_value": min(TOP_K, count)}
    own = experts(moe, link, case["a"][:count], case["b"][:count], shared, **cut)
    # Experts that make 1 in a place of their own out of ones show their weights.
    halves = torch.full((count, RANK, 2), 0.5, dtype=torch.float64)
    places = torch.eye(count, dtype=torch.float64)[:, :, None].expand(-1, -1, RANK)
    shown = experts(moe, link, halves, places, shared, **cut)
    output = around(linear, [routed, own], x)
    shown.pre_forward(torch.ones(*x.shape[:2], 2, dtype=torch.float64))
    weights = shown.post_forward(torch.zeros(*x.shape[:2], count, dtype=torch.float64))[0]
    return {
        "experts": count,
        "scores": scores(routed, x),
        "probabilities": shared[WRITTEN],
        "weights": weights,
        "output": output,
    }


def run_gate(moe: Any, linear: nn.Module, case: dict[str, Any]) -> dict[str, Any]:
    """The output of the first expert while its gate is trained."""
    link, x = moe.MoELink(), case["x"]
    shared: dict[Any, Any] = {READ: x}
    routed = router(moe, link, case["gates"][:1], shared)
    settings = {"topk_value": 1, "learn_input_gate": "only_sigmoid"}
    own = experts(moe, link, case["a"][:1], case["b"][:1], shared, **settings)
    own.expert_input_gate.data = case["gates"][0]
    return {"gate": 0, "output": around(linear, [routed, own], x)}


def main() -> None:
    """Write the file next to this script."""
    moe = imported(sys.argv[1])
    gin.bind_parameter("ExtendableAddon.separate_experts", True)
    case = make_case()
    linear = nn.Linear(INPUTS, OUTPUTS).double()
    linear.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    written_by = {"phatgoose": COMMIT, "torch": version("torch"), "command": COMMAND}
    with torch.no_grad():
        cases = [run(moe, linear, case, count) for count in EXPERTS]
        write(__file__, written_by, case, [*cases, run_gate(moe, linear, case)])


if __name__ == "__main__":
    main()
