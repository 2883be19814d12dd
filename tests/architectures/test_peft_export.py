"""Adapters that the hub writes, as peft loads and calls them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES
from experthub import hub
from experthub.hub.bases import base as bases
from torch import Tensor

# The task type that peft needs, by architecture; None for models that it calls without one.
TYPES = {
    "llama": "CAUSAL_LM",
    "mamba": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "whisper": None,
    "bert": "FEATURE_EXTRACTION",
    "bert_mlm": None,
    "roberta": "SEQ_CLS",
    "modernbert": "FEATURE_EXTRACTION",
    "vit": None,
    "clip": None,
    "siglip": None,
    "wav2vec2": None,
    "llava": None,
}
AUTO = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    None: peft.AutoPeftModel,
}
TARGETS = r".*(q_proj|query|x_proj|SelfAttention\.q|Wqkv|in_proj)"


def first(output: Any) -> Tensor:
    """Return the first floating-point output of a model."""
    return next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_peft_loads_and_calls_what_is_exported(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    base = tmp_path / "base"
    model.save_pretrained(base)
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(tmp_path / "lora")
    recipe = {"base": str(base), "experts": [str(tmp_path / "lora")], "merge": {"method": "linear"}}
    hub.compose(recipe).save(tmp_path / "out", format="peft")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["task_type"] == TYPES[name]
    assert written["base_model_name_or_path"] == str(base)
    expected = first(adapted.base_model.model(**architecture.inputs()))
    assert not torch.allclose(expected, first(model(**architecture.inputs())), atol=1e-3)
    loaded = AUTO[TYPES[name]].from_pretrained(tmp_path / "out").eval()
    found = first(loaded(**architecture.inputs()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    torch.testing.assert_close(
        first(again(**architecture.inputs())), expected, atol=1e-4, rtol=1e-4
    )


def test_the_base_is_named_as_others_find_it(base_folder: Path, tmp_path: Path) -> None:
    found = bases.read(base_folder, "mine")
    assert found.public_name == "mine"
    fetched = replace(found, sources=("pypi:x==1", "hf:org/model@0123abc"))
    assert fetched.public_name == "org/model"
    assert replace(fetched, aka=("org/first", "org/second")).public_name == "org/first"
