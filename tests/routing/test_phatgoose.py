"""PHATGOOSE against the closed form of its paper, literally, on a tiny random Llama."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, logits
from experthub import hub
from experthub.merge import LowRank
from experthub.routing import ExpertStack, RoutedLinear, phatgoose, routers
from safetensors.torch import load_file
from torch import nn

Make = Callable[..., Path]


class Literal(nn.Module):
    """y = W x + sum over the top k of softmax(LN(x) LN(g)^T / (t sqrt(d))), renormalised."""

    def __init__(
        self, base: nn.Module, experts: list[tuple[Any, Any, float, Any]], k: int, t: float = 1.0
    ) -> None:
        super().__init__()
        self.base, self.experts, self.k, self.t = base, experts, k, t

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = x.shape[-1]
        gates = torch.stack([g for _, _, _, g in self.experts])
        scores = nn.functional.layer_norm(x, (d,)) @ nn.functional.layer_norm(gates, (d,)).T
        p = (scores / math.sqrt(d) / self.t).softmax(-1)
        top, index = p.topk(min(self.k, len(self.experts)), dim=-1)
        w = torch.zeros_like(p).scatter(-1, index, top / top.sum(-1, keepdim=True))
        y = self.base(x)
        for e, (a, b, scale, _) in enumerate(self.experts):
            y = y + w[..., e : e + 1] * scale * ((x @ a.T) @ b.T)
        return y


def literal_model(model: Any, folders: list[Path], scales: list[float], k: int) -> Any:
    """The base with every module that some expert adapts replaced by the closed form."""
    stored = [
        (load_file(f / "adapter_model.safetensors"), load_file(f / "phatgoose_gates.safetensors"))
        for f in folders
    ]
    names = {n.removesuffix(".gate") for _, gates in stored for n in gates}
    for name in sorted(names):
        key = f"base_model.model.{name}"
        here = [
            (t[f"{key}.lora_A.weight"], t[f"{key}.lora_B.weight"], scale, gates[f"{name}.gate"])
            for (t, gates), scale in zip(stored, scales, strict=True)
            if f"{name}.gate" in gates
        ]
        model.set_submodule(name, Literal(model.get_submodule(name), here, k))
    return model


def recipe(base: Path, folders: list[Path], k: int) -> dict[str, Any]:
    return {
        "base": str(base),
        "experts": [str(f) for f in folders],
        "route": {"method": "phatgoose", "top_k": k},
    }


def padded_batch() -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left."""
    rows = [[7, 8, 9, 10, 11, 12], [100, 90, 80], [250, 1, 2, 3, 4]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


CASES = [(n, k) for n in (1, 2, 3, 5, 8, 16) for k in sorted({1, 2, 3, n - 1, n}) if 1 <= k <= n]


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("n", "k"), CASES)
def test_equals_the_closed_form(
    n: int, k: int, base_folder: Path, base: Any, expert_folder: Make
) -> None:
    """Mixed ranks and mixed targets, a padded batch, and decoding with a cache."""
    targets = [LINEARS, LINEARS[:4], LINEARS[4:], ("q_proj", "down_proj")]
    folders = [
        expert_folder(e, rank=1 + e % 5, targets=targets[e % 4], size=0.2, lora_alpha=3 + e % 3)
        for e in range(n)
    ]
    scales = [(3 + e % 3) / (1 + e % 5) for e in range(n)]
    composed = hub.compose(recipe(base_folder, folders, k)).model
    from experthub.hub.bases.loading import load_model

    expected_model = literal_model(load_model(base, None, None), folders, scales, k)
    batch = padded_batch()
    with torch.no_grad():
        expected = expected_model(**batch).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(
            composed(**batch).logits[real], expected[real], atol=1e-5, rtol=1e-5
        )
        whole = expected_model(input_ids=batch["input_ids"][:1]).logits
        cache, steps = None, []
        for token in batch["input_ids"][0]:
            out = composed(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_every_count_of_experts_and_k(base_folder: Path) -> None:
    """One linear, E in 1..16, k in 1..E, against the literal form."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 10).requires_grad_(False)
    x = torch.randn(2, 5, 24)
    for n in range(1, 17):
        experts = [
            (torch.randn(1 + e % 4, 24), torch.randn(10, 1 + e % 4), 0.5 + e, torch.randn(24))
            for e in range(n)
        ]
        deltas = {e: LowRank(a, b, s) for e, (a, b, s, _) in enumerate(experts)}
        stack = ExpertStack.of(deltas, n, {e: g for e, (*_, g) in enumerate(experts)})
        for k in range(1, n + 1):
            t = (1.0, 0.25, 4.0)[k % 3]
            routed = RoutedLinear.from_stack(
                linear, stack, phatgoose(stack, top_k=k, temperature=t)
            )
            expected = Literal(linear, experts, k, t)(x)
            torch.testing.assert_close(routed(x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["phatgoose", "smear"])
@pytest.mark.parametrize(("scale", "shift"), [(100.0, 0.0), (0.3, 0.0), (1.0, 30.0), (7.0, -50.0)])
def test_the_size_and_the_mean_of_a_gate_do_not_matter(
    method: str, scale: float, shift: float
) -> None:
    """Gates of people who share nothing are compared by direction alone, but for LayerNorm's epsilon."""
    random = torch.Generator().manual_seed(0)
    deltas = {
        e: LowRank(torch.randn(2, 24, generator=random), torch.randn(10, 2, generator=random), 1.0)
        for e in range(5)
    }
    gates = [torch.randn(24, generator=random) for _ in deltas]
    x = torch.randn(2, 40, 24, generator=random) + 3 * torch.randn(2, 1, 24, generator=random)
    found = []
    for change in (False, True):
        own = {e: gate * scale + shift * e if change else gate for e, gate in enumerate(gates)}
        stack = ExpertStack.of(deltas, 5, own)
        found.append(RoutedLinear.from_stack(nn.Linear(24, 10), stack, routers[method].call(stack)))
    plain, changed = (module.compute_weights(x) for module in found)
    assert float((plain - 1 / 5).abs().max()) > 0.1
    torch.testing.assert_close(changed, plain, atol=1e-3, rtol=1e-3)


def test_detach_restores_the_base_bit_for_bit(
    base_folder: Path, base_model: Any, expert_folder: Make
) -> None:
    before = logits(base_model)
    composition = hub.compose(
        recipe(base_folder, [expert_folder(1), expert_folder(2)], 2), model=base_model
    )
    assert not torch.equal(logits(composition.model), before)
    assert torch.equal(logits(base_model), before), "the model given was changed"
    assert torch.equal(logits(composition.detach()), before)


def test_an_untrained_gate_gives_equal_shares(base_folder: Path, expert_folder: Make) -> None:
    """A gate of zeros scores zero: no NaN, and uniform shares where all are zero."""
    from safetensors.torch import save_file

    folders = [expert_folder(1), expert_folder(2)]
    for folder in folders:
        path = folder / "phatgoose_gates.safetensors"
        save_file({n: torch.zeros_like(g) for n, g in load_file(path).items()}, path)
    routed = hub.compose(recipe(base_folder, folders, 2)).model
    uniform = hub.compose(
        {
            "base": str(base_folder),
            "experts": [str(f) for f in folders],
            "merge": {"method": "linear"},
        }
    ).model
    torch.testing.assert_close(logits(routed), logits(uniform), atol=1e-4, rtol=1e-4)
