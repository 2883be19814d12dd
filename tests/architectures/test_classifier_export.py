"""Merged classifiers that are exported as adapters with their heads, as peft loads them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import BY_LABEL, compute, text
from experthub import hub
from safetensors.torch import load_file, save_file

TARGETS = {
    "BERT classifier": ["query", "value"],
    "RoBERTa classifier": ["query", "value"],
    "Llama classifier": ["q_proj", "v_proj"],
}


def make_experts(label: str, base: Path, folder: Path, heads: bool) -> None:
    """Write two random LoRAs, as peft writes those of classifiers; their heads are the base's or not."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=TARGETS[label], task_type="SEQ_CLS")
        made = peft.get_peft_model(BY_LABEL[label].load(base).float(), config)
        made.save_pretrained(folder / name)
        file = folder / name / "adapter_model.safetensors"
        stored = load_file(file)
        for key, tensor in stored.items():
            if ".lora_" in key or heads:
                stored[key] = torch.randn(tensor.shape) * 0.2
        save_file(stored, file, metadata={"format": "pt"})


@pytest.mark.parametrize("heads", ["of the base", "averaged", "of one expert"])
@pytest.mark.parametrize("label", TARGETS)
def test_peft_computes_what_the_composition_does(label: str, heads: str, tmp_path: Path) -> None:
    one = BY_LABEL[label]
    base = one.save(tmp_path / "base")
    make_experts(label, base, tmp_path, heads != "of the base")
    recipe = {
        "base": str(base),
        "experts": [str(tmp_path / "a"), str(tmp_path / "b")],
        "merge": {"method": "linear"},
    }
    if heads == "of one expert":
        recipe["dense_parts"] = "b"
    merged = hub.compose(recipe)
    merged.save(tmp_path / "out", format="peft")
    wanted = compute(merged.model.double(), text())
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    plain = one.load(base)
    assert float((compute(plain, text()) - wanted).abs().max()) > 1e-3
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out").double().eval()
    kind = peft.AutoPeftModelForSequenceClassification
    found = kind.from_pretrained(tmp_path / "out").double().eval()
    for model in (adapted, found):
        assert isinstance(model.get_base_model(), transformers.PreTrainedModel)
        difference = (compute(model, text()) - wanted).abs().max() / wanted.abs().max()
        assert float(difference) < 1e-6
    again = hub.compose({**recipe, "experts": [str(tmp_path / "out")], "dense_parts": None})
    difference = (compute(again.model.double(), text()) - wanted).abs().max() / wanted.abs().max()
    assert float(difference) < 1e-6
