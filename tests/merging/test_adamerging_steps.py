"""The engine's steps are those that fusion_bench's classes took, on the data that they were recorded with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from experthub.merge import Dense, Fit, TaskVector, learn_coefficients
from golden.tiny import Tiny, logits
from learning import make_materials
from test_adamerging_golden import BATCHES, CASES, GOLDEN, HEADS, VECTORS, WEIGHTS, difference
from torch import Tensor


class Recorded:
    """The recorded batches, one after the other, whatever rows are asked for."""

    labels = held_out = real = None

    def __init__(self) -> None:
        self.model = Tiny().double().requires_grad_(False)
        self.model.load_state_dict(WEIGHTS)
        self.tasks = [f"task {t}" for t in range(len(HEADS))]
        self.sizes = [len(x) for x in BATCHES[0]]
        self.batches = iter(BATCHES)

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        batches = next(self.batches)
        return [logits(self.model(x), h) for x, h in zip(batches, HEADS, strict=True)]


def vector(changes: dict[str, Tensor]) -> TaskVector:
    return TaskVector("tiny", {n: (lambda d=d: Dense(d)) for n, d in changes.items()})


def steps(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[float]]:
    """The coefficients `[steps, experts, blocks in the recorded order]`, and the losses."""
    monkeypatch.setattr("experthub.merge._fitting.SAVE_EVERY", 1)
    found: list[Tensor] = []
    materials = make_materials(
        [vector(changes) for changes in VECTORS],
        Recorded(),
        save=lambda state: found.append(state["values"]),
    )
    fit = Fit(
        objective="entropy",
        granularity=case["granularity"],
        start=GOLDEN["initial"],
        steps=len(BATCHES),
        lr=case["lr"],
        batch_size=1000,
        constraint="clamp" if case["clamped"] else "none",
    )
    learned = learn_coefficients(materials, fit)
    values = torch.stack(found)
    if case["granularity"] == "task":
        return values[..., 0], list(learned.history)
    order = [learned.blocks.index(name) for name in GOLDEN["order"]]
    return values[..., order], list(learned.history)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_twenty_steps(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are equal up to rounding without the 1e-8 that fusion_bench adds to probabilities, and
    close with it."""
    coefficients, history = steps(case, monkeypatch)
    within = 1e-10 if case["entropy"] == "literal" else 1e-6
    assert difference(coefficients, case["coefficients"]) < within
    recorded = torch.tensor(case["losses"], dtype=torch.float64).mean(1)
    assert (torch.tensor(history, dtype=torch.float64) - recorded).abs().max() < within
