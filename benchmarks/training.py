"""Time one step of training: an expert (peft's LoRA), and the gates of one (PHATGOOSE).

SmolLM2-135M, a batch of 8 inputs of 64 tokens, every linear adapted at rank 4, float32, two threads;
forward, backward and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _bench import (
    BASE,
    LINEARS,
    THREADS,
    arguments,
    finish,
    ratio,
    run_rounds,
    spread,
    surroundings,
    timed,
)
from experthub.hub import Registry
from experthub.hub.base_sources import find
from experthub.hub.bases import load_model
from experthub.merge import LowRank
from experthub.routing import ExpertStack, RoutedLinear, untrained_gate
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

BATCH, TOKENS, RANK, TARGET = 8, 64, 4, 1.1


def lora(model: Any) -> Any:
    """A fresh LoRA on every linear, as `hub train lora` makes it."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS))
    return get_peft_model(model, config)


def gated(model: Any) -> Any:
    """A random expert and an untrained gate on every linear, as `hub train gate` makes them."""
    linears = [(n, m) for n, m in model.named_modules() if n.endswith(LINEARS)]
    for name, module in linears:
        outputs, inputs = module.weight.shape
        a, b = torch.randn(RANK, inputs) / inputs**0.5, torch.randn(outputs, RANK) * 0.01
        stack = ExpertStack.of({0: LowRank(a, b, 2.0)}, 1)
        gate = RoutedLinear.alone(module, stack, untrained_gate(stack), train_probes=True)
        model.set_submodule(name, gate)
    return model


def step(model: Any, ids: Tensor) -> Callable[[], Any]:
    """One step of AdamW over whatever can be trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    causal = model.get_base_model() if isinstance(model, PeftModel) else model

    def run() -> None:
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        loss = nn.functional.mse_loss(hidden, torch.zeros_like(hidden))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments(__doc__)
    torch.set_num_threads(THREADS)
    base = find(BASE, Registry.read())
    around = surroundings({})
    ids = torch.randint(1000, 40000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    models = {
        "expert": lora(load_model(base, "float32", "cpu")),
        "gate": gated(load_model(base, "float32", "cpu")),
    }
    trained = {
        name: sum(p.numel() for p in m.parameters() if p.requires_grad)
        for name, m in models.items()
    }
    times = run_rounds(
        {name: timed(step(model, ids)) for name, model in models.items()}, options.rounds
    )
    for case, seconds in times.items():
        print(
            f"{case:12} {spread(seconds):32} {ratio(times, case, 'expert'):6.3f} x expert, {trained[case]} trained"
        )
    print(f"target: a gate's step at most {TARGET} x an expert's")
    finish(
        {
            "benchmark": "training",
            "surroundings": around,
            "seconds": times,
            "median_seconds": {case: median(seconds) for case, seconds in times.items()},
            "ratio_to_expert": {case: ratio(times, case, "expert") for case in times},
            "trained": trained,
            "target": TARGET,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
