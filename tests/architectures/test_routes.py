"""Routes on many architectures: every module that a merge changes is reached, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from experthub import hub
from experthub.hub.composition.weight_reads import WeightReads
from experthub.hub.errors import HubError, UsageError
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.merge import (
    AttachedExperts,
    Coefficients,
    LowRank,
    TaskVector,
    find_weight_reads,
    is_linear,
    is_transposed,
)
from experthub.routing import ExpertStack, RoutedLinear, routers
from torch import Tensor, nn


def compute(model: Any, architecture: Architecture) -> list[Tensor]:
    """Compute the outputs for the architecture's input, in the model's dtype."""
    given = architecture.inputs().items()
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given}
    with torch.no_grad():
        found = model(**inputs)
    return [v for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()]


def route_uniformly(model: Any) -> dict[str, Tensor]:
    """Route two random experts beside every linear module; return their mean changes."""
    random, means = torch.Generator().manual_seed(1), {}
    reads = find_weight_reads(model)
    for name, module in list(model.named_modules()):
        if not is_linear(module):
            continue
        turned, weight = is_transposed(module), module.weight
        outputs, inputs = weight.shape[::-1] if turned else weight.shape
        deltas = {
            e: LowRank(
                torch.randn(3, inputs, generator=random, dtype=weight.dtype) * 0.2,
                torch.randn(outputs, 3, generator=random, dtype=weight.dtype) * 0.2,
                1.5,
            )
            for e in range(2)
        }
        stack = ExpertStack.of(deltas, 2)
        routed = RoutedLinear.from_stack(module, stack, routers["uniform"].call(stack))
        model.set_submodule(name, routed)
        mean = (deltas[0].dense() + deltas[1].dense()) / 2
        means[name] = mean.T if turned else mean
    WeightReads.attach(model, reads)
    return means


@pytest.mark.parametrize("name", [n for n, one in ARCHITECTURES.items() if not one.again])
def test_uniform_is_linear_in_float64(name: str) -> None:
    architecture = ARCHITECTURES[name]
    base = architecture.build().double()
    routed, merged = copy.deepcopy(base), copy.deepcopy(base)
    for path, change in route_uniformly(routed).items():
        module = merged.get_submodule(path)
        module.weight = nn.Parameter(module.weight + change, requires_grad=False)
    before, expected = compute(base, architecture), compute(merged, architecture)
    assert max((b - e).abs().max() for b, e in zip(before, expected, strict=True)) > 1e-3
    for found, wanted in zip(compute(routed, architecture), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


def test_a_read_that_is_no_product_is_refused_by_name() -> None:
    bloom = ARCHITECTURES["bloom"]
    model = bloom.build(slow_but_exact=True, pretraining_tp=2)
    route_uniformly(model)
    with pytest.raises(UsageError, match=r"h\.0\.self_attention\.dense cannot be routed"):
        compute(model, bloom)
    rwkv = Architecture(
        "RwkvForCausalLM",
        {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "rescale_every": 1},
    )
    model = rwkv.build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    route_uniformly(model)
    with pytest.raises(UsageError, match=r"blocks\.0\.attention\.output cannot be routed: div_"):
        compute(model, rwkv)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Owner(nn.Module):
    """A module that reads the weights of its linear modules in every way."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "product", "both", "convolved", "looked_at", "cast"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.looked_at.weight.dtype))
        x = (self.product.weight @ x.transpose(1, 2)).transpose(1, 2)
        x = self.both(x) + nn.functional.linear(x, self.both.weight)
        x = nn.functional.linear(x.double(), self.cast.weight.double())
        kernel = self.convolved.weight[..., None].double()
        return nn.functional.conv1d(x.transpose(1, 2), kernel)


def test_the_ways_in_which_a_weight_is_read() -> None:
    found = find_weight_reads(Owner())
    assert {n: (r.is_product, r.is_called) for n, r in found.items()} == {
        "product": (True, False),
        "both": (True, True),
        "cast": (True, False),
        "convolved": (False, False),
    }
    assert [name for name, read in found.items() if read.is_lost] == ["convolved"]


def test_a_module_that_is_called_and_read_is_routed_once_each() -> None:
    base = Owner()
    base.convolved = nn.Embedding(4, 4)  # Not a linear module.
    routed, merged = copy.deepcopy(base), copy.deepcopy(base)
    for path, change in route_uniformly(routed).items():
        merged.get_submodule(path).weight.data += change
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(routed(x), merged(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "t5", "llava", "whisper"])
def test_routers_of_whole_rows_are_refused_by_the_plan(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path / "base")
    targets = r".*(q_proj|SelfAttention\.q)"
    get_peft_model(model, LoraConfig(target_modules=targets)).save_pretrained(tmp_path / "lora")
    experts = [{"expert": str(tmp_path / "lora"), "as": one} for one in ("a", "b")]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "route": {"method": "task"}}
    with pytest.raises(HubError, match="chooses for whole examples of a language model"):
        resolve(Recipe.of(recipe))


@pytest.mark.parametrize("name", ["mamba", "siglip_vision"])
def test_detaching_gives_the_base_bit_for_bit(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    architecture = ARCHITECTURES[name]
    model = architecture.build()
    model.save_pretrained(tmp_path / "base")
    expected = compute(model, architecture)
    targets = ["dt_proj"] if name == "mamba" else r"head\.attention\.out_proj"
    config = LoraConfig(target_modules=targets, init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "lora")
    experts = [str(tmp_path / "lora")]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "route": {"method": "uniform"}}
    composition = hub.compose(recipe)
    merge = {"base": recipe["base"], "experts": experts, "merge": {"method": "linear"}}
    merged = hub.compose(merge).model
    found, wanted = compute(composition.model, architecture), compute(merged, architecture)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    for one, two in zip(compute(composition.detach(), architecture), expected, strict=True):
        assert torch.equal(one, two)


def test_a_learned_merge_reaches_a_weight_that_is_read() -> None:
    mamba = ARCHITECTURES["mamba"]
    model = mamba.build().requires_grad_(False)
    name = "backbone.layers.0.mixer.dt_proj.weight"
    outputs, inputs = model.get_parameter(name).shape
    change = LowRank(torch.randn(3, inputs) * 0.2, torch.randn(outputs, 3) * 0.2)
    vector = TaskVector("base", {name: lambda: change})
    weight = model.get_parameter(name).detach().clone()
    like = Coefficients(torch.tensor([[0.5]]), ("model",), "task")
    with AttachedExperts(model, [vector], like) as attached:
        attached.set(like.values)
        found = model(**mamba.inputs()).logits.detach()
    model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(
        weight + 0.5 * change.dense(), requires_grad=False
    )
    torch.testing.assert_close(found, model(**mamba.inputs()).logits, atol=1e-5, rtol=1e-5)
