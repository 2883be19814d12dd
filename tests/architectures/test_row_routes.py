"""Routers that decide for whole rows see every row, whichever part of a model its head calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, ENCODER_DECODER, Architecture, text
from experthub import hub
from experthub.hub.composition.forward_hooks import list_entries
from torch import Tensor

# Heads that call a part of their base model: OPT, and the decoders of encoder-decoders.
PARTS = {
    "opt": ARCHITECTURES["opt"],
    "bart_causal": Architecture("BartForCausalLM", ENCODER_DECODER),
    "pegasus_causal": Architecture("PegasusForCausalLM", ENCODER_DECODER),
}
WHOLE = {name: ARCHITECTURES[name] for name in ("llama", "gpt2", "bloom", "gemma2", "bert")}


def make_experts(model: Any, folder: Path) -> list[dict[str, str]]:
    from peft import LoraConfig, get_peft_model

    experts = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed + 5)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
        experts.append({"expert": str(folder / name), "as": name})
    return experts


def read(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found = model(input_ids=ids, **more)
    output: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return output


@torch.no_grad()
@pytest.mark.parametrize("name", [*PARTS, *WHOLE])
def test_each_row_gets_the_expert_of_its_task(name: str, tmp_path: Path) -> None:
    architecture = (PARTS | WHOLE)[name]
    folder = architecture.save(tmp_path / "base")
    experts = make_experts(architecture.build(), tmp_path)
    recipe: dict[str, Any] = {"base": str(folder), "experts": experts}
    routed = hub.compose(recipe | {"route": {"method": "task"}})
    ids = text()["input_ids"][:2]
    wanted = []
    for row, expert in enumerate(experts):
        alone = recipe | {"experts": [expert], "merge": {"method": "linear"}}
        wanted.append(read(hub.compose(alone).model, ids)[row])
    with routed.tasks(["a", "b"]):
        found = read(routed.model, ids)
        torch.testing.assert_close(found, torch.stack(wanted), atol=1e-4, rtol=1e-4)
        if name not in ("bert",):
            first = routed.model(input_ids=ids[:, :3], use_cache=True)
            rest = routed.model(input_ids=ids[:, 3:], past_key_values=first.past_key_values)
            both = torch.cat([first.logits, rest.logits], 1)
            torch.testing.assert_close(both, found, atol=1e-4, rtol=1e-4)
            base_model = routed.model.base_model(input_ids=ids).last_hidden_state
            by_head = routed.model.get_output_embeddings()(base_model)
            if name not in ("opt", "gemma2"):  # Their heads do more than to multiply.
                torch.testing.assert_close(by_head, found, atol=1e-4, rtol=1e-4)
    with routed.tasks(["b", "a"]):
        assert (read(routed.model, ids) - found).abs().max() > 1e-3
    # A forward pass that fails leaves nothing behind.
    with pytest.raises(Exception), routed.tasks(["a", "b"]):  # noqa: B017
        routed.model(input_ids=ids + 10_000)
    with routed.tasks(["a", "b"]):
        torch.testing.assert_close(read(routed.model, ids), found)


@torch.no_grad()
@pytest.mark.parametrize("name", PARTS)
def test_a_prompt_decides_in_a_head_that_calls_a_part(name: str, tmp_path: Path) -> None:
    folder = PARTS[name].save(tmp_path / "base")
    experts = make_experts(PARTS[name].build(), tmp_path)
    routed = hub.compose({"base": str(folder), "experts": experts, "route": {"method": "task"}})
    ids = text()["input_ids"][:2]
    with routed.tasks(["a", "b"]):
        cached = routed.model.generate(ids, max_new_tokens=5, do_sample=False)
        whole = routed.model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)


def test_the_base_model_and_the_parts_that_alone_read_are_entries() -> None:
    names = {
        name: [type(entry).__name__ for entry in list_entries(one.build())]
        for name, one in (PARTS | WHOLE).items()
    }
    assert names == {
        "opt": ["OPTModel", "OPTDecoder"],
        "bart_causal": ["BartDecoderWrapper", "BartDecoder"],
        "pegasus_causal": ["PegasusDecoderWrapper", "PegasusDecoder"],
        "llama": ["LlamaModel"],
        "gpt2": ["GPT2Model"],
        "bloom": ["BloomModel"],
        "gemma2": ["Gemma2Model"],
        "bert": ["BertModel"],
    }
