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
COUNT = re.compile(
    r"(\w*_)?(layers?|blocks?|experts?|heads?|groups?|stages?|depths?|labels?|early_exit)"
)
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# Keys by which transformers or timm loads from elsewhere, for `backbone` even with local_files_only,
# and values of them that do no harm.
# transformers 5.0.0 passes `backbone_kwargs` to from_pretrained, where `trust_remote_code: true`
# runs code of that repository. From 5.1.0 on it is passed to a configuration only, and transformers
# reads nothing but the repository's config.json, which the hub refuses, too.
ELSEWHERE: dict[str, Any] = {
    "backbone": None,
    "backbone_kwargs": None,
    "use_pretrained_backbone": None,
    "use_timm_backbone": None,
    "checkpoint_path": None,
    "transformers_weights": "model.safetensors",
    "configuration_files": ["config.json"],
    "fast_tokenizer_files": ["tokenizer.json"],
}


def check_model(folder: Path) -> dict[str, Any]:
    """Check the configuration files of a model folder.

    It rejects all that `check_configs` rejects, and a class that is not named by a text.

    Args:
        folder: The folder.

    Returns:
        The content of `config.json`.

    Raises:
        IntegrityError: A file names code, another repository or other files, has a huge count, or
            is malformed.
    """
    check_configs(folder)
    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise IntegrityError(
            f"{folder / 'config.json'}: architectures is {short(names)}",
            "write a list with the name of one class",
        )
    return config


def check_configs(folder: Path) -> None:
    """Check the configuration files that lie beside weights, before transformers sees the folder.

    It rejects `auto_map` (classes in Python files), attention kernels of a model hub, backbones of
    other repositories, other files than those that the base's digest covers, an adapter beside the
    model, and numbers of layers that no model has.

    Args:
        folder: The folder.

    Raises:
        IntegrityError: A file names code, another repository or other files, or is malformed.
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


def _check_config(config: dict[str, Any], name: str) -> None:
    """Reject a configuration in which any key names code or files elsewhere, or a huge count."""
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
            code = kernel or (key == "auto_map" and inner)
            # timm loads the names `hf-hub:org/name` and `local-dir:path` from elsewhere.
            elsewhere = key == "architecture" and re.search("[:/]", str(inner))
            elsewhere = elsewhere or (inner and inner != ELSEWHERE.get(key, inner))
            if code or elsewhere or re.fullmatch(r"_\w*_implementation_internal", key):
                what = "another repository or file" if elsewhere else "code"
                raise IntegrityError(
                    f"{name}: {key} is {short(inner)}, which names {what}",
                    "remove the key if transformers itself has the model; other code is never run",
                )
            left.append(inner)
