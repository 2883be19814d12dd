"""Write adamerging.json: what fusion_bench's AdaMerging classes do to a tiny model in 20 steps.

    python -m venv ENV && ENV/bin/pip install --no-deps -r tests/golden/fusion_bench.txt
    ENV/bin/python tests/golden/adamerging.py

The steps are those of `fusion_bench/method/adamerging/{layer,task}_wise_adamerging.py`, whose loops
cannot be called without a Lightning fabric. "literal entropy" puts -sum p log p in the place of
fusion_bench's own, which is -sum p log(p + 1e-8); all else is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.models.wrappers.layer_wise_fusion import (
    LayerWiseMergedModel,
    get_layer_wise_weights,
)
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from tiny import Tiny, logits
from torch import Tensor

CLASSES, STEPS, BATCH, INITIAL = (3, 4, 5), 20, 4, 0.3
COMMAND = "python tests/golden/adamerging.py"


def literal(found: Tensor) -> Tensor:
    """The mean entropy over rows as the paper writes it."""
    log_p = found.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def short(random: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    """Random numbers of four decimals, in float64."""
    drawn = torch.randn(*shape, generator=random, dtype=torch.float64)
    return (drawn * size * 1e4).round() / 1e4


def make_inputs() -> dict[str, Any]:
    """The base's parameters in their order, the task vectors, the heads, and a batch per step and task.

    The last expert leaves one parameter as it is: its coefficient has no gradient.
    """
    random = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in Tiny().named_parameters()}
    experts = [
        {name: short(random, *shape, size=0.5) for name, shape in shapes.items()} for _ in CLASSES
    ]
    experts[-1]["norm.bias"].zero_()
    return {
        "parameters": {name: short(random, *shape, size=0.6) for name, shape in shapes.items()},
        "task_vectors": experts,
        "heads": [short(random, classes, 6) for classes in CLASSES],
        "batches": [[short(random, BATCH, 4) for _ in CLASSES] for _ in range(STEPS)],
    }


def merged_model(inputs: dict[str, Any], granularity: str, clamped: bool) -> Any:
    """fusion_bench's own merged model of the inputs, at the initial coefficients."""
    base = Tiny().double()
    base.load_state_dict(inputs["parameters"])
    finetuned = []
    for vector in inputs["task_vectors"]:
        model = deepcopy(base)
        model.load_state_dict({name: p + vector[name] for name, p in inputs["parameters"].items()})
        finetuned.append(model)
    if granularity == "task":  # its own function makes float32
        weight = torch.full((len(finetuned),), INITIAL, dtype=torch.float64)
        return TaskWiseMergedModel(weight, base, finetuned, clamp_weights=clamped)
    count = len(inputs["parameters"])
    weight = get_layer_wise_weights(len(finetuned), count, INITIAL, dtype=torch.float64)
    return LayerWiseMergedModel(weight, base, finetuned, clamp_weights=clamped)


def run(module: Any, inputs: dict[str, Any], entropy: Callable[[Tensor], Tensor], lr: float) -> Any:
    """The coefficients after each step, the loss of each task before it, and the first gradient."""
    optimizer = torch.optim.Adam([module.merge_weight], lr=lr)
    coefficients, losses, first = [], [], None
    module.train()
    module.merge_weights()
    for batches in inputs["batches"]:
        losses.append([])
        for batch, head in zip(batches, inputs["heads"], strict=True):
            loss = entropy(logits(module(batch), head))
            loss.backward(retain_graph=True)
            losses[-1].append(loss.item())
        if first is None:
            first = module.merge_weight.grad.tolist()
        optimizer.step()
        optimizer.zero_grad()
        module.merge_weights()
        coefficients.append(module.merge_weight.tolist())
    return {"first_gradient": first, "losses": losses, "coefficients": coefficients}


def main() -> None:
    """Write the file next to this script, one line for each case."""
    inputs = make_inputs()
    entropies = {"fusion_bench": entropy_loss, "literal": literal}
    cases = []
    for granularity, clamped, lr, name in product(
        ("layer", "task"), (False, True), (0.001, 0.1), entropies
    ):
        module = merged_model(inputs, granularity, clamped)
        case = {"granularity": granularity, "clamped": clamped, "lr": lr, "entropy": name}
        cases.append(case | run(module, inputs, entropies[name], lr))
    written_by = {name: version(name) for name in ("fusion_bench", "torch")} | {"command": COMMAND}
    header = {"written_by": written_by, "initial": INITIAL, "order": list(inputs["parameters"])}
    fields = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in header.items()]
    for key, value in inputs.items():
        fields.append(f"{json.dumps(key)}: {json.dumps(value, default=Tensor.tolist)}")
    lines = ",\n".join(json.dumps(case) for case in cases)
    fields.append(f'"cases": [\n{lines}\n]')
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
