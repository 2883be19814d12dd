"""The dense parts of an adapter: tensors beside its factors that replace or change parameters.

PEFT writes them for modules_to_save, trained biases, trained tokens, and embeddings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.json_files import read_small
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.formats.peft_rules import find_rank_and_scale
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    TensorInfo,
    parse_header,
    read_header_text,
)

PREFIX = "base_model.model."
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
TRAINED_TOKENS = ".token_adapter.trainable_tokens_delta"
# Modules that PEFT saves by itself, whatever older configurations say.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# The ends of names of parameters whose rows are tokens. Beside such parts, an adapter's folder has the
# tokenizer that it was trained with.
TOKEN_ROWS = tuple(
    f"{name}.weight"
    for name in (
        "embed_tokens",
        "wte",
        "word_embeddings",
        "embed_in",
        "token_embedding",
        "tok_embeddings",
        "shared",
        "lm_head",
        "embed_out",
        "proj_out",
    )
)
# The keys of the configuration that describe dense parts.
DENSE_KEYS = (
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
# `copy` is a copy of the base's own parameter, for every use of it. `replace` takes its place in one
# module only, `rows` replaces some of its rows, and `add` is added to it.
Way = Literal["copy", "replace", "rows", "add"]
ORDER: tuple[Way, ...] = ("copy", "replace", "rows", "add")


@dataclass(frozen=True)
class DensePart:
    """A tensor of an adapter that changes a parameter, but is no factor of a low-rank change.

    Args:
        parameter: The name of the parameter in the base.
        tensor: The name of the tensor in the file.
        way: How the tensor changes the parameter.
        shape: The shape of the tensor.
        rows: The rows of the parameter that the tensor replaces, for `rows`.
        scale: The factor of the tensor, for `add`.
        digest: The checksum of its content, if it was read.
    """

    parameter: str
    tensor: str
    way: Way
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    scale: float = 1.0
    digest: str = ""


def read_dense_parts(config: Path, weights: Path, name: str) -> tuple[DensePart, ...]:
    """Read which dense parts an adapter has. Only its header is read.

    Args:
        config: The path of `adapter_config.json`, which was checked.
        weights: The path of `adapter_model.safetensors`.
        name: The name of the adapter in errors.

    Returns:
        The parts by parameter, in the order in which they apply. Adapters with equal headers and
        configurations share one tuple.

    Raises:
        IntegrityError: A part does not fit the configuration.
    """
    try:
        with limit_matching_time():
            return _read_dense_parts(read_small(config), *read_header_text(weights))
    except HubError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from None


@lru_cache(maxsize=64)
def _read_dense_parts(config_text: bytes, header: bytes, size: int) -> tuple[DensePart, ...]:
    """Read dense parts from the bytes of the files. The result is cached."""
    config, tensors = json.loads(config_text), parse_header(header, size)
    found = [find_dense_part(config, tensors, name) for name in tensors]
    parts = [part for part in found if part is not None]
    return tuple(sorted(parts, key=lambda part: (part.parameter, ORDER.index(part.way))))


def group_parts(parts: Iterable[DensePart]) -> dict[str, tuple[DensePart, ...]]:
    """Group dense parts by the parameter that they change.

    Args:
        parts: The parts.

    Returns:
        The parts of each parameter, in their order.
    """
    found: dict[str, tuple[DensePart, ...]] = {}
    for part in parts:
        found[part.parameter] = (*found.get(part.parameter, ()), part)
    return found


def find_dense_part(config: Mapping[str, Any], header: Header, tensor: str) -> DensePart | None:
    """Find which dense part a tensor of an adapter is.

    Args:
        config: The content of `adapter_config.json`.
        header: The tensors of the file.
        tensor: The name of the tensor.

    Returns:
        The part; None for a factor, and for a tensor that the adapter does not use.

    Raises:
        IntegrityError: The tensor is no part of the adapter that its configuration describes.
    """
    info, name = header[tensor], tensor.removeprefix(PREFIX)
    if FACTOR.fullmatch(tensor) or ".original_module." in name:
        return None
    if not tensor.startswith(PREFIX) or info.dtype not in FLOATS:
        raise _refuse(tensor)
    if name.endswith(TRAINED_TOKENS):
        return _find_trained_tokens(config, info, tensor, name.removesuffix(TRAINED_TOKENS))
    module, _, leaf = name.rpartition(".")
    if module.endswith(".lora_B") and leaf == "bias" and config.get("lora_bias"):
        place = module.removesuffix(".lora_B")
        return DensePart(
            f"{place}.bias", tensor, "add", info.shape, scale=find_rank_and_scale(config, place)[1]
        )
    saved = _is_saved(config, module) or ".modules_to_save." in name
    for inner in (".modules_to_save", ".token_adapter.base_layer", ".base_layer"):
        name = name.replace(f"{inner}.", ".")
    place = name.rpartition(".")[0]
    if "lora_" in name or not (saved or leaf in ("weight", "bias") or "bias" in name):
        raise _refuse(tensor)
    if place == module and not saved and f"{PREFIX}{module}.lora_A.weight" in header:
        raise IntegrityError(
            f"tensor {tensor!r} belongs to a module with a LoRA, so that peft would not load it",
            f"rename it to {PREFIX}{module}.base_layer.{leaf}, or remove it",
        )
    return DensePart(name, tensor, "replace" if saved else "copy", info.shape)


def check_declared_parts(config: Mapping[str, Any], parts: Iterable[DensePart]) -> None:
    """Check that the file has parts for the keys of the configuration that require some.

    PEFT names modules that other models have, so one of `modules_to_save` is enough. A bias that is
    missing is zero, or the base's, in PEFT too.

    Args:
        config: The content of `adapter_config.json`, which was checked.
        parts: The dense parts of the file.

    Raises:
        IntegrityError: The file has no tensor for a key. PEFT would not load it either.
    """
    tokens = config.get("trainable_token_indices") or []
    listed = any(tokens.values()) if isinstance(tokens, dict) else bool(tokens)
    saved, found = config.get("modules_to_save") or [], [*parts]
    missing = {
        "trainable_token_indices": listed and not any(part.way == "rows" for part in found),
        "modules_to_save": bool(saved)
        and not any(_is_within(part.parameter.rpartition(".")[0], saved) for part in found),
    }
    for key in (key for key, is_missing in missing.items() if is_missing):
        raise IntegrityError(
            f"{key} is {short(config[key])}, and the file holds no weights for it",
            f"check that the file is complete, or remove {key} if the adapter was trained without it",
        )


def _find_trained_tokens(
    config: Mapping[str, Any], info: TensorInfo, tensor: str, module: str
) -> DensePart:
    """Return the part of trained tokens, whose rows the configuration lists."""
    listed = config.get("trainable_token_indices")
    if isinstance(listed, dict):
        listed = next((rows for name, rows in listed.items() if module.endswith(name)), None)
    rows = tuple(listed or ())
    if len(info.shape) != 2 or len(rows) != info.shape[0] or len(set(rows)) < len(rows):
        raise IntegrityError(
            f"{tensor} has {list(info.shape)}, and trainable_token_indices lists "
            f"{len(set(rows))} different tokens",
            "correct trainable_token_indices in adapter_config.json",
        )
    return DensePart(f"{module}.weight", tensor, "rows", info.shape, rows)


def _is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether a module is one of modules_to_save, or inside of one, by PEFT's rule."""
    names = [*(config.get("modules_to_save") or []), *HEADS.get(str(config.get("task_type")), ())]
    return _is_within(module, names)


def _is_within(module: str, names: Iterable[str]) -> bool:
    """Tell whether the path of a module, or of one around it, ends with one of several names."""
    places = [module]
    while "." in places[-1]:
        places.append(places[-1].rpartition(".")[0])
    return any(place.endswith(tuple(names)) for place in places)


def _refuse(tensor: str) -> IntegrityError:
    """Make the error for a tensor that is no part of a LoRA."""
    return IntegrityError(
        f"tensor {tensor!r} is not a part of a plain LoRA",
        "train it as a LoRA, or merge it with peft and store the difference with hub diff",
    )
