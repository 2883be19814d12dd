"""Types of the values in a base's `config.json`: transformers checks some only when a model runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from experthub.hub.errors import IntegrityError

# Keys that the caches and masks of transformers read whether or not the architecture has them.
SHARED: dict[str, Any] = {
    "attention_chunk_size": int | None,
    "attn_implementation": str | dict[str, str] | None,
    "is_causal": bool | None,
    "layer_types": list[str] | None,
    "num_kv_shared_layers": int | None,
    "sliding_window": int | None,
}
NESTED = "_config"  # The end of a key whose value configures a part of the model.


def check_stated_types(config: Mapping[str, Any], file: Path, prefix: str = "") -> None:
    """Check the values that no architecture of transformers checks by itself.

    Args:
        config: The content of the file, or of a part of it.
        file: The file, for messages.
        prefix: The keys that lead to the part, each with a dot.

    Raises:
        IntegrityError: A value has another type than transformers expects.
    """
    for key, kind in (_list_common_types() | SHARED).items():
        if key in config:
            _check(config[key], kind, f"{prefix}{key}", file)
    for key, value in config.items():
        if key.endswith(NESTED) and isinstance(value, dict):
            check_stated_types(value, file, f"{prefix}{key}.")


def check_rotations(config: Any, file: Path, prefix: str = "") -> None:
    """Check the settings of rotary embeddings, which may lie under several keys of the file.

    Args:
        config: The configuration as transformers has read it, or the one of a part.
        file: The file, for messages.
        prefix: The keys that lead to the part, each with a dot.

    Raises:
        IntegrityError: A value has another type than transformers expects.
    """
    stated = getattr(config, "rope_parameters", None)
    parts = [stated, *stated.values()] if isinstance(stated, dict) else []
    for part in parts:
        for key, kind in _list_rotation_types().items():
            if isinstance(part, dict) and key in part:
                _check(part[key], kind, f"{prefix}{key}", file)
    for key in getattr(config, "sub_configs", None) or {}:
        if getattr(config, key, None) is not None:
            check_rotations(getattr(config, key), file, f"{prefix}{key}.")


@cache
def _list_common_types() -> dict[str, Any]:
    """List the types of the settings that all configurations have."""
    kind: Any = import_module("transformers.configuration_utils").PreTrainedConfig
    hints = get_type_hints(kind, localns={"torch": torch})
    own = getattr(kind, "__dataclass_fields__", {})
    # Older versions of transformers declare no fields.
    return {key: hints[key] for key, field in own.items() if field.init and key in hints}


@cache
def _list_rotation_types() -> dict[str, Any]:
    """List the types of the settings of rotary embeddings."""
    module: Any = import_module("transformers.modeling_rope_utils")
    return get_type_hints(module.RopeParameters)


def _check(value: Any, kind: Any, key: str, file: Path) -> None:
    """Refuse a value that does not fit its type."""
    if not _fits(value, kind):
        raise IntegrityError(
            f"{file}: {key} is {short(value)}, and transformers expects {_describe(kind)}",
            f"correct {key}, or remove it",
        )
    if key.rpartition(".")[2] in SHARED and type(value) is int and value < 0:
        raise IntegrityError(
            f"{file}: {key} is {value}, and transformers expects no negative number",
            f"correct {key}, or remove it",
        )


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value of a JSON file fits a type; types that JSON lacks are not checked."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if outer is Literal:
        return value in inner
    if outer is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if outer is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if outer is list:
        return isinstance(value, list) and all(_fits(one, *inner[:1] or (Any,)) for one in value)
    if outer in (bool, str, dict, NoneType):
        return isinstance(value, outer)
    return outer is not torch.dtype or isinstance(value, str)


def _describe(kind: Any) -> str:
    """Write a type as it reads in a JSON file."""
    text = str(kind) if get_origin(kind) else kind.__name__
    return text.replace("typing.", "").replace("None", "null").replace("torch.dtype", "a dtype")
