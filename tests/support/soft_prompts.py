"""Soft prompts and prefixes that peft writes for tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

CONFIGS = {
    "prompt": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
}


def write_adapter(
    load: Any,
    base: Path,
    folder: Path,
    *,
    kind: str = "prompt",
    tokens: int = 4,
    seed: int = 0,
    task_type: str = "CAUSAL_LM",
    **settings: Any,
) -> Path:
    """Write a random adapter of one type of peft.

    `load` is a function that loads the base's model.
    """
    torch.manual_seed(seed)
    more = {"encoder_hidden_size": 12} if kind == "p-tuning" else {}
    config = CONFIGS[kind](
        task_type=task_type,
        num_virtual_tokens=tokens,
        **(more | settings),  # type: ignore[arg-type]
    )
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=0.7)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def load_peft(load: Any, base: Path, folder: Path) -> Any:
    """The model of peft with an adapter, in float64."""
    return PeftModel.from_pretrained(load(base), folder).double().eval()
