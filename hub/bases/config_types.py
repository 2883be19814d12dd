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
from experthub.hub.files.json_files import read_json

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
CACHE = "cache_implementation"


def check_files(folder: Path) -> None:
    """Check the values of `config.json` and of `generation_config.json` before they are used.

    Args:
        folder: The model folder.

    Raises:
        IntegrityError: A value has another type than transformers expects, or names an unknown cache.
    """
    check_stated_types(read_json(folder / "config.json"), folder / "config.json")
    for file in (folder / "config.json", folder / "generation_config.json"):
        stated = read_json(file).get(CACHE) if file.is_file() else None
        if stated is not None and stated not in (known := _list_caches()):
            raise IntegrityError(
                f"{file}: {CACHE} is {short(stated)}, and transformers knows {', '.join(known)}",
                f"correct {CACHE}, or remove it",
            )


def prepare_config(config: Any, file: Path) -> None:
    """Check a configuration that transformers has read, and let its models name their outputs.

    With `return_dict: false`, models would return tuples, which the hub does not read.

    Args:
        config: The configuration, which is changed in place.
        file: The file, for messages.

    Raises:
        IntegrityError: A setting of rotary embeddings has another type than transformers expects.
    """
    check_rotations(config, file)
    left = [config]
    while left:
        part = left.pop()
        if getattr(part, "return_dict", True) is not True:
            part.return_dict = True
        own = (getattr(part, key, None) for key in getattr(part, "sub_configs", None) or {})
        left += [one for one in own if hasattr(one, "to_dict")]


def find_unknown_value(error: Exception, file: Path) -> str:
    """Find the setting whose value transformers did not find in one of its tables.

    Args:
        error: The error that transformers raised.
        file: The configuration of the model.

    Returns:
        The key and its value; an empty text if the error has another cause.
    """
    if not isinstance(error, KeyError) or not error.args:
        return ""
    wanted = str(error.args[0])
    left = [("", read_json(file))]
    while left:
        prefix, values = left.pop()
        for key, value in values.items():
            if isinstance(value, dict):
                left.append((f"{prefix}{key}.", value))
            named = isinstance(value, str) and value
            if named and (wanted == value or wanted.startswith(f"function {value} not found")):
                return f"{prefix}{key} is {short(value)}, which transformers does not know"
    return ""


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


def _list_caches() -> tuple[str, ...]:
    """List the names of caches that transformers has."""
    module: Any = import_module("transformers.generation.configuration_utils")
    return (*module.ALL_CACHE_IMPLEMENTATIONS, "paged")


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
