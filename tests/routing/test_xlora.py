"""X-LoRA against peft's, with the same classifier and adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import logits
from experthub import hub
from experthub.routing import State

ROWS = [[5, 77, 130, 9, 200, 33, 41], [9, 33, 12, 50, 77, 1, 2]]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_equals_peft(
    base_folder: Path,
    expert_folder: Callable[..., Path],
    tiny_task: str,
    depth: int,
    top_k: int | None,
) -> None:
    folders = [expert_folder(seed) for seed in range(3)]
    config = transformers.AutoConfig.from_pretrained(base_folder, use_cache=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, config=config)
    theirs = peft.get_peft_model(
        base,
        peft.XLoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            hidden_size=32,
            xlora_depth=depth,
            xlora_size=16,
            layerwise_scalings=False,
            softmax_temperature=0.5,
            top_k_lora=top_k,
            adapters={str(i): str(folder) for i, folder in enumerate(folders)},
        ),
    ).eval()
    linears = [
        module
        for module in theirs.internal_xlora_classifier.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    random = torch.Generator().manual_seed(depth)
    state = {}
    for i, linear in enumerate(linears):
        linear.weight.data = torch.randn(linear.weight.shape, generator=random) / 4
        linear.bias.data = torch.randn(linear.bias.shape, generator=random) / 4
        state |= {f"classifier.{i}.weight": linear.weight, f"classifier.{i}.bias": linear.bias}
    route = {"method": "xlora", "depth": depth, "size": 16, "temperature": 0.5, "layerwise": False}
    recipe = {
        "base": str(base_folder),
        "experts": list(map(str, folders)),
        "route": {**route, "top_k": top_k},
        "data": {"tasks": [tiny_task], "labels": True},
    }
    ours = hub.compose(recipe, state=State({n: t.detach() for n, t in state.items()}))
    # Both compute the experts' weights in float32, and the rest in float64.
    expected = logits(theirs.double(), ROWS)
    torch.testing.assert_close(logits(ours.model.double(), ROWS), expected, atol=1e-4, rtol=1e-4)
