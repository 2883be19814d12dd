"""Checks of a base's configuration: it must not make transformers run or load anything else."""

from __future__ import annotations

import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import ADAPTER_CONFIG

# Keys by which transformers would use code or other files, and a value that does no harm.
ELSEWHERE = {
    "auto_map": None,
    "transformers_weights": "model.safetensors",
    "configuration_files": ["config.json"],
    "fast_tokenizer_files": ["tokenizer.json"],
}
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def check_model(folder: Path) -> dict[str, Any]:
    """Check the configuration files of a model folder.

    It rejects `auto_map` (classes in Python files), attention kernels of a model hub, other files
    than those that the base's digest covers, and an adapter beside the model.

    Args:
        folder: The folder.

    Returns:
        The content of `config.json`.

    Raises:
        IntegrityError: A file names code or other weights, or is malformed.
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
    """Reject a configuration in which any key names code or other weights."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        if not isinstance(value, dict):
            continue
        for key, inner in value.items():
            kernel = key.endswith("_implementation") and "/" in str(inner)
            named = key in ELSEWHERE and inner and inner != ELSEWHERE[key]
            if kernel or named or re.fullmatch(r"_\w*_implementation_internal", key):
                raise IntegrityError(
                    f"{name}: {key} is {short(inner)}, which names code or other files",
                    "remove the key if transformers itself has the model; other code is never run",
                )
            left.append(inner)
