"""Soft prompts and prefixes of peft: what its adapters of these types save, as files of the hub.

Shapes: N virtual tokens, H features of an embedding, L layers, A heads of keys and values, D features
of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn

import torch
from experthub.hub.conversion.changes import TRAIN_LORA, check_keys
from experthub.hub.conversion.foreign_adapter import ForeignAdapter
from experthub.hub.conversion.peft_types.adapter_type import COMMON
from experthub.hub.errors import IntegrityError, UsageError
from experthub.hub.finetunes.form import Form
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.formats.prompt import PROMPT, PROMPT_EMBEDDINGS
from safetensors.torch import save_file
from torch import Tensor

PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
EMBEDDINGS = PREFIX + PROMPT_EMBEDDINGS
ENCODER_DECODER = "SEQ_2_SEQ_LM"
TASK_TYPES = ("CAUSAL_LM", ENCODER_DECODER)
# The keys of the configurations besides `COMMON`. The tensor is what peft computed by all of them.
KEYS = frozenset(
    {
        *("num_virtual_tokens", "token_dim", "num_transformer_submodules"),
        *("num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text"),
        *("tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection"),
        *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
        "encoder_reparameterization_type",
    }
)


def is_prompt(config: Mapping[str, Any]) -> bool:
    """Tell whether an adapter is a soft prompt or a prefix.

    Args:
        config: The content of its `adapter_config.json`.

    Returns:
        True for the types of peft that save computed embeddings, keys or values.
    """
    return str(config.get("peft_type")).upper() in PROMPT_TYPES


def write_prompt(adapter: ForeignAdapter, folder: Path, form: Form) -> dict[str, Any]:
    """Write an adapter of peft as a soft prompt or a prefix of the hub.

    Args:
        adapter: The adapter.
        folder: The folder to write into.
        form: The dtype of the tensors; float32 keeps the bits of the adapter.

    Returns:
        The figures of the report.

    Raises:
        IntegrityError: The configuration and the tensor do not fit each other.
        UsageError: The form has a rank.
    """
    config, name = adapter.config, str(adapter.config["peft_type"]).upper()
    if form.rank is not None:
        raise UsageError(f"{adapter.name} is a {name}, which has no rank", "remove --rank")
    check_keys(adapter, name, COMMON | KEYS)
    if config.get("task_type") not in TASK_TYPES:
        raise IntegrityError(
            f"{adapter.name}: task_type is {short(config.get('task_type'))}, and the hub puts soft "
            "prompts before the texts of language models and encoder-decoders only",
            TRAIN_LORA,
        )
    others = sorted(set(adapter.tensors) - {EMBEDDINGS})
    if others or EMBEDDINGS not in adapter.tensors:
        _refuse(adapter, f"expected one tensor prompt_embeddings, found {short(others)}")
    saved = adapter.tensors[EMBEDDINGS]
    if saved.ndim != 2 or not saved.is_floating_point():
        _refuse(adapter, f"prompt_embeddings is {saved.dtype} {list(saved.shape)}")
    make = _split_prefix if name == "PREFIX_TUNING" else _cut_prompt
    tensors = make(adapter, saved)
    kept = tensors
    if form.dtype != "float32":
        kept = {key: value.to(getattr(torch, form.dtype)) for key, value in tensors.items()}
    if not all(bool(torch.isfinite(value).all()) for value in kept.values()):
        _refuse(adapter, f"the embeddings overflow {form.dtype}, or are not finite")
    save_file({key: value.contiguous() for key, value in kept.items()}, folder / PROMPT)
    missed = sum(float((tensors[k].double() - v.double()).square().sum()) for k, v in kept.items())
    total = float(saved.double().square().sum())
    return {"relative_error": float(f"{math.sqrt(missed / total) if total else 0.0:.4g}")}


def _cut_prompt(adapter: ForeignAdapter, saved: Tensor) -> dict[str, Tensor]:
    """Return the embeddings `[N, H]`. For an encoder-decoder, peft saves N more that it never reads."""
    tokens = _read_count(adapter, "num_virtual_tokens")
    doubled = adapter.config["task_type"] == ENCODER_DECODER
    copies = _read_count(adapter, "num_transformer_submodules", 2 if doubled else 1)
    if saved.shape[0] != tokens * copies:
        _refuse(
            adapter,
            f"prompt_embeddings has {len(saved)} rows, and num_virtual_tokens is {tokens}",
        )
    return {"prompt": saved[:tokens]}


def _split_prefix(adapter: ForeignAdapter, saved: Tensor) -> dict[str, Tensor]:
    """Return the keys and the values `[L, A, N, D]` of a prefix `[N, L * 2 * A * D]`."""
    if adapter.config["task_type"] == ENCODER_DECODER:
        raise IntegrityError(
            f"{adapter.name} is a prefix of an encoder-decoder, and the hub puts prefixes before the "
            "texts of causal language models only",
            "train a soft prompt (peft's PromptTuningConfig) or a LoRA instead",
        )
    tokens, layers = (_read_count(adapter, k) for k in ("num_virtual_tokens", "num_layers"))
    heads, width = (_read_count(adapter, k) for k in ("num_attention_heads", "token_dim"))
    if width % heads or tuple(saved.shape) != (tokens, layers * 2 * width):
        _refuse(
            adapter,
            f"prompt_embeddings is {list(saved.shape)}, and its configuration states {tokens} tokens, "
            f"{layers} layers, and {heads} heads of {width} features together",
        )
    found = saved.view(tokens, layers, 2, heads, width // heads).permute(2, 1, 3, 0, 4)
    return {"keys": found[0], "values": found[1]}


def _read_count(adapter: ForeignAdapter, key: str, default: int | None = None) -> int:
    """Return a positive number of the configuration."""
    value = adapter.config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        _refuse(adapter, f"{key} is {short(value)}, expected a number of at least 1")
    return value


def _refuse(adapter: ForeignAdapter, fact: str) -> NoReturn:
    """Refuse an adapter whose files do not fit each other."""
    raise IntegrityError(
        f"{adapter.name}: {fact}", "copy both files again, or save the adapter again with peft"
    )
