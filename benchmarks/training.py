"""Time one step of training: an expert (peft's LoRA), its gates (PHATGOOSE), and skills (Poly, MHR).

The base is SmolLM2-135M in float32 with two threads, adapted at rank 4 on every linear module. A step is
forward, backward and AdamW on a batch of 8 inputs of 64 tokens.
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
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.session import Session
from experthub.merge import LowRank
from experthub.routing import BatchTasks, ExpertStack, RoutedLinear, SkilledLinear, make_gate
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

BATCH, TOKENS, RANK, TARGET, SKILLS_TARGET = 8, 64, 4, 1.1, 1.2


def lora(model: Any) -> Any:
    """Add an untrained LoRA to every linear module, as `hub train lora` does.

    Args:
        model: The base.

    Returns:
        The model with its LoRA.
    """
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS))
    return get_peft_model(model, config)


def gated(model: Any) -> Any:
    """Add a random expert and an untrained gate to every linear module, as `hub train gate` does.

    Args:
        model: The base.

    Returns:
        The model with its gates.
    """
    linears = [(n, m) for n, m in model.named_modules() if n.endswith(LINEARS)]
    for name, module in linears:
        outputs, inputs = module.weight.shape
        a, b = torch.randn(RANK, inputs) / inputs**0.5, torch.randn(outputs, RANK) * 0.01
        stack = ExpertStack.of({0: LowRank(a, b, 2.0)}, 1)
        gate = RoutedLinear.from_stack(module, stack, make_gate(stack), train_probes=True)
        model.set_submodule(name, gate)
    return model


def skilled(model: Any, n_skills: int, n_heads: int) -> Any:
    """Add skills to every linear module, as `hub train skills` does. Every row has its own task.

    Args:
        model: The base.
        n_skills: The number of skills.
        n_heads: The number of heads.

    Returns:
        The model with its skills.
    """
    model.requires_grad_(False)
    rows = BatchTasks(torch.arange(BATCH))
    for name, module in [(n, m) for n, m in model.named_modules() if n.endswith(LINEARS)]:
        outputs, inputs = module.weight.shape
        a = torch.randn(n_skills, RANK, inputs) / inputs**0.5
        b = torch.randn(n_skills, outputs, RANK) * 0.01
        logits = nn.Parameter(torch.zeros(BATCH, n_heads, n_skills))
        model.set_submodule(name, SkilledLinear(module, a, b, 1.0, logits, rows))
    return model


def step(model: Any, ids: Tensor) -> Callable[[], Any]:
    """Return a function that runs one step of AdamW on all trainable parameters.

    Args:
        model: The model.
        ids: The token ids `[inputs, tokens]`.

    Returns:
        The function.
    """
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
    base = find(BASE, Session())
    around = surroundings({})
    ids = torch.randint(1000, 40000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))

    def fresh() -> Any:
        return load_model(base, "float32", "cpu")

    models = {
        "expert": lora(fresh()),
        "gate": gated(fresh()),
        "shared": skilled(fresh(), 1, 1),
        "poly": skilled(fresh(), 8, 1),
        "mhr": skilled(fresh(), 8, 8),
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
            f"{case:12} {spread(seconds):32} {ratio(times, case, 'expert'):6.3f} x expert, {trained[case]} numbers trained"
        )
    print(f"target: a gate's step at most {TARGET} x an expert's")
    for case in ("poly", "mhr"):
        print(f"{case}: {ratio(times, case, 'shared'):.3f} x shared, target {SKILLS_TARGET}")
    finish(
        {
            "benchmark": "training",
            "surroundings": around,
            "seconds": times,
            "median_seconds": {case: median(seconds) for case, seconds in times.items()},
            "ratio_to_expert": {case: ratio(times, case, "expert") for case in times},
            "ratio_to_shared": {case: ratio(times, case, "shared") for case in ("poly", "mhr")},
            "trained": trained,
            "target": TARGET,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
