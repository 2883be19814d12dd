"""Checks of a base's configuration: it must not make transformers run or load anything else."""

from __future__ import annotations

import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import ADAPTER_CONFIG

MAX_COUNT = 100_000
# Keys of counts: transformers makes lists and modules of so many parts.
COUNT = re.compile(r"(\w*_)?(layers?|blocks?|experts?|heads?|groups?|stages?|depths?)")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def check_model(folder: Path) -> dict[str, Any]:
    """Check the configuration files of a model folder.

    It rejects `auto_map` (classes in Python files), attention kernels of a model hub, weights under
    another name than the fingerprinted one, an adapter beside the model, and numbers of layers that
    no model has.

    Args:
        folder: The folder.

    Returns:
        The content of `config.json`.

    Raises:
        IntegrityError: A file names code or other weights, has a huge count, or is malformed.
    """
    # transformers would also load an adapter beside the model, and an adapter has no fingerprint.
    if (folder / ADAPTER_CONFIG).exists():
        raise IntegrityError(
            f"{folder} holds a model and {ADAPTER_CONFIG}, which transformers would load, too",
            "move the adapter to a folder of its own, and add it as an expert",
        )
    for name in CONFIGS:
        if (folder / name).is_file():
            _check_config(read_json(folder / name), f"{folder / name}")
    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise IntegrityError(
            f"{folder / 'config.json'}: architectures is {short(names)}",
            "write a list with the name of one class",
        )
    return config


def _check_config(config: dict[str, Any], name: str) -> None:
    """Reject a configuration in which any key names code or other weights, or a huge count."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            counts = inner if isinstance(inner, list) else [inner]
            if COUNT.fullmatch(key) and any(type(n) is int and n > MAX_COUNT for n in counts):
                raise IntegrityError(
                    f"{name}: {key} is {short(inner)}, more than {MAX_COUNT}",
                    "correct the number, or fetch the base again",
                )
            kernel = key.endswith("_implementation") and "/" in str(inner)
            named = key in ("auto_map", "transformers_weights") and inner
            if kernel or named or re.fullmatch(r"_\w*_implementation_internal", key):
                raise IntegrityError(
                    f"{name}: {key} is {short(inner)}, which names code or other weights",
                    "remove the key if transformers itself has the model; other code is never run",
                )
            left.append(inner)
