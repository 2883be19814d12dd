"""The configuration of a base: what would let transformers run or load something else is refused."""

from __future__ import annotations

import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.kinds.lora import ADAPTER_CONFIG

CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def check_model(folder: Path) -> dict[str, Any]:
    """A model folder's config.json; IntegrityError when its files name code or other weights.

    Refused are `auto_map` (classes in Python files), attention kernels of a model hub, weights
    under another name than the fingerprinted one, and an adapter beside the model.
    """
    # Transformers would load an adapter beside the model as well, and it has no fingerprint.
    if (folder / ADAPTER_CONFIG).exists():
        raise IntegrityError(
            f"{folder} holds a model and {ADAPTER_CONFIG}, which would be loaded too",
            "put the adapter into a folder of its own, and add it as an expert",
        )
    for name in CONFIGS:
        if (folder / name).is_file():
            _check_config(read_json(folder / name), f"{folder / name}")
    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise IntegrityError(
            f"{folder / 'config.json'}: architectures is {short(names)}", "name one class"
        )
    return config


def _check_config(config: dict[str, Any], name: str) -> None:
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            kernel = key.endswith("_implementation") and "/" in str(inner)
            named = key in ("auto_map", "transformers_weights") and inner
            if kernel or named or re.fullmatch(r"_\w*_implementation_internal", key):
                raise IntegrityError(
                    f"{name}: {key} is {short(inner)}, which names code or other weights",
                    "only what transformers itself has is used; remove the key if it has the model",
                )
            left.append(inner)
