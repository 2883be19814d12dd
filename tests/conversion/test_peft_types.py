"""Adapters of every type of peft, against peft's own merged weights in float64."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_kinds
import pytest
import torch
from experthub import hub
from experthub.hub.errors import HubError
from peft_kinds import TYPES, load, make_adapter, make_base, measure, reload_merged
from safetensors.torch import load_file, save_file

FAST = ("llama",)
BOUND = (
    3e-7  # of the largest entry of a change: float32 holds 6e-8, and peft computes some in float32
)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    logging.disable(logging.WARNING)
    made: dict[str, Path] = {}

    def find(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_base(architecture, tmp_path_factory.mktemp("base") / "m")
        return made[architecture]

    yield find
    logging.disable(logging.NOTSET)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[] if a in FAST else pytest.mark.slow) for a in peft_kinds.TARGETS],
)
def test_change_is_that_of_peft(kind: str, architecture: str, base_of: Any, tmp_path: Path) -> None:
    base = base_of(architecture)
    try:
        make_adapter(kind, base, tmp_path / "adapter", architecture)
    except (TypeError, ValueError) as reason:
        pytest.skip(f"peft has no {kind} for {architecture}: {str(reason)[:60]}")
    if peft_kinds.lacks_biases(kind, base, architecture):
        with pytest.raises(HubError, match="has no bias in the base"):
            hub.convert(tmp_path / "adapter", tmp_path / "out")
        return
    if (kind, architecture) == ("OLoRA", "gpt2"):  # peft computes it of the transposed weight
        with pytest.raises(HubError, match="init_lora_weights is 'olora'"):
            hub.convert(tmp_path / "adapter", tmp_path / "out")
        return
    difference, largest, made = measure(base, tmp_path / "adapter", tmp_path / "out")
    assert difference <= BOUND * largest, f"off by {difference:.2g} of {largest:.2g}"
    assert made.made_from["relative_error"] < 1e-6


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr", "IA3", "PiSSA"])
def test_composed_logits_are_those_of_peft(kind: str, base_of: Any, tmp_path: Path) -> None:
    base = base_of("llama")
    made = make_adapter(kind, base, tmp_path / "adapter", "llama")
    hub.convert(tmp_path / "adapter", tmp_path / "out")
    recipe = {
        "base": str(base),
        "experts": [str(tmp_path / "out")],
        "merge": {"method": "linear"},
    }
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        right = made(input_ids=ids).logits
        got = hub.compose(recipe).model(input_ids=ids).logits
    assert float((got - right).abs().max()) < 1e-4 * float(right.abs().max())


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_change_one_use_of_a_tied_weight(dora: bool, tmp_path: Path) -> None:
    base = make_base("gpt2", tmp_path / "base")  # Its embeddings are tied.
    more = {"target_modules": ["wte", "attn.c_proj"], "use_dora": dora}
    made = make_adapter("LoRA", base, tmp_path / "adapter", "gpt2", **more)
    for path in (tmp_path / "adapter").glob("*.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if "base_layer" not in k}
        save_file({k: v.contiguous() for k, v in kept.items()}, path)
    hub.convert(tmp_path / "adapter", tmp_path / "out")
    recipe = {"base": str(base), "experts": [str(tmp_path / "out")], "merge": {"method": "linear"}}
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        right = made(input_ids=ids).logits
        got = hub.compose(recipe).model(input_ids=ids).logits
        plain = load(base)(input_ids=ids).logits
    assert float((plain - right).abs().max()) > 1
    assert float((got - right).abs().max()) < 1e-4 * float(right.abs().max())


@pytest.mark.parametrize("word", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_the_adapter_before_the_training_undoes_any_initialisation(
    word: str, base_of: Any, tmp_path: Path
) -> None:
    """Subtract as peft does: `W + change = W - s B0 A0 + s B A`."""
    base = base_of("llama")
    make_adapter("LoRA", base, tmp_path / "before", "llama")
    make_adapter("LoRA", base, tmp_path / "after", "llama", lora_dropout=0.1)
    tensors = load_file(tmp_path / "after" / "adapter_model.safetensors")
    save_file(
        {k: v + 0.1 for k, v in tensors.items()}, tmp_path / "after/adapter_model.safetensors"
    )
    config = tmp_path / "after" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": word}))
    changes = [peft_kinds.read_deltas(tmp_path / "before")]
    hub.convert(tmp_path / "after", tmp_path / "out", initial=tmp_path / "before")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    changes.append(peft_kinds.read_deltas(tmp_path / "after"))
    for name, got in peft_kinds.read_deltas(tmp_path / "out").items():
        right = changes[1][name] - changes[0][name]
        assert float((got - right).abs().max()) < 1e-6 * float(right.abs().max())


def test_an_initialisation_by_data_is_refused_without_the_adapter_before(
    base_of: Any, tmp_path: Path
) -> None:
    make_adapter("LoRA", base_of("llama"), tmp_path / "adapter", "llama")
    config = tmp_path / "adapter" / "adapter_config.json"
    for word in ("corda", "pissa_niter_4", "lora_ga"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": word}))
        with pytest.raises(HubError, match="only the adapter before its training") as caught:
            hub.convert(tmp_path / "adapter", tmp_path / "out")
        assert "--initial" in caught.value.hint and not (tmp_path / "out").exists()


def test_rank_states_the_error_of_the_best_approximation(base_of: Any, tmp_path: Path) -> None:
    base = base_of("llama")
    make_adapter("DoRA", base, tmp_path / "adapter", "llama")
    made = hub.convert(tmp_path / "adapter", tmp_path / "out", rank=5)
    merged, before = reload_merged(base, tmp_path / "adapter"), dict(load(base).named_parameters())
    got, total, missed, best = peft_kinds.read_deltas(tmp_path / "out"), 0.0, 0.0, 0.0
    for name, parameter in merged.named_parameters():
        true = (parameter - before[name].double()).detach()
        if name in got:
            total += float(true.square().sum())
            missed += float((true - got[name]).square().sum())
            best += float(torch.linalg.svdvals(true)[5:].square().sum())
    assert made.kind == "lora"
    assert abs((missed / total) ** 0.5 - made.made_from["relative_error"]) < 1e-4
    assert abs(missed - best) < 1e-5 * total


def test_a_rank_above_the_sides_of_a_weight_stays_exact(base_of: Any, tmp_path: Path) -> None:
    make_adapter("LoHa", base_of("llama"), tmp_path / "adapter", "llama", r=9)
    made = hub.convert(tmp_path / "adapter", tmp_path / "out")
    assert made.made_from["ranks"]["max"] == 32 and made.made_from["relative_error"] < 1e-7
