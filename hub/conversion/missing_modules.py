"""Modules that the configuration of an adapter targets, and for which its file has no weights."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from experthub.hub.conversion.found_adapter import FoundAdapter
from experthub.hub.errors import HubError
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.formats.peft_rules import is_targeted
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.registry import Registry

MODULE = re.compile(
    r"(?:base_model\.model\.)?(.+?)\.(?:lora|hada|lokr|ia3|oft|boft|vera|hra)_\w+.*"
)
LAYER = re.compile(r"(.*?\.)?(\d+)\.(.+)")
SHOWN = 3
# The errors for a configuration, a pattern of it, or a base that cannot be used.
UNUSABLE = (
    *(HubError, TimeoutError, re.error, RecursionError, OverflowError),
    *(OSError, ValueError, TypeError, AttributeError),
)


def describe_missing(found: FoundAdapter, base: str | None, registry: Registry) -> str:
    """Say which of the modules that a configuration targets have no weights in the file.

    With a base at hand, only its own modules are reported: those that the configuration names, or
    those that other layers of the file have. Without one, names of `target_modules` that no module
    has, and modules that only some layers have, are reported.

    Args:
        found: An adapter of peft.
        base: The base, if the user names it.
        registry: The registry, for the folder of the base.

    Returns:
        A sentence; an empty text if nothing is missing.
    """
    modules = {m[1] for m in map(MODULE.fullmatch, read_header(found.weights)) if m}
    if not modules:
        return ""
    named = base or str(found.config.get("base_model_name_or_path") or "")
    folder = _find_local_folder(named, registry)
    try:
        with limit_matching_time():
            expected = _guess(found.config, modules)
            if folder:
                linear = _list_matrices(folder)
                targeted = {module for module in linear if _is_chosen(found.config, module)}
                expected = targeted or expected & linear
            missing = sorted(expected - _find_named(expected, modules))
    except UNUSABLE:
        return ""  # Whoever uses the adapter reports it.
    if not missing:
        return ""
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    shown = ", ".join(name[:80] for name in missing[:SHOWN])
    return (
        f"it has no weights for {shown}{more}, which its target_modules match; they stay unchanged"
    )


def _find_named(expected: set[str], modules: set[str]) -> set[str]:
    """Return the expected modules that a file names, with or without the prefix of the base model."""
    known = modules | {_without_prefix(module) for module in modules}
    return {name for name in expected if name in known or _without_prefix(name) in modules}


def _without_prefix(module: str) -> str:
    """Return the name of a module below the first one, such as `model` or `transformer`."""
    return module.partition(".")[2]


def _find_local_folder(named: str, registry: Registry) -> Path | None:
    """Return the folder of a base that is one, without fetching anything."""
    places = [Path(named)] if named and not registry.has_base(named) else []
    if named and registry.has_base(named):
        name, entry = registry.find_base(named)
        near = registry.find_base_folder(name)
        parsed = [Reference.parse(source, near).folder for source in entry.sources]
        places = [place for place in parsed if place is not None]
    return next((place for place in places if (place / "config.json").is_file()), None)


def _list_matrices(folder: Path) -> set[str]:
    """List the modules of a base whose weight is a matrix."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(path).items():
            module = name.removesuffix(".weight")
            if module != name and len(info.shape) == 2:
                found.add(module)
    return found


def _is_chosen(config: dict[str, Any], module: str) -> bool:
    """Tell whether the configuration names the module; a configuration without names chooses none."""
    target = config.get("target_modules")
    return bool(target) and target != "all-linear" and is_targeted(config, module)


def _guess(config: dict[str, Any], modules: set[str]) -> set[str]:
    """List the modules that the others of the file let one expect."""
    layers: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        match = LAYER.fullmatch(module)
        if match:
            layers[f"{match[1] or ''}\0{match[3]}"].add(match[2])
    everywhere = set().union(*layers.values()) if layers else set()
    expected = {
        name.replace("\0", f"{number}.")
        for name in layers
        for number in everywhere
        if config.get("layers_to_transform") in (None, [])
    }
    target = config.get("target_modules")
    if isinstance(target, list):
        expected |= {
            str(name)
            for name in target
            if not any(m == name or m.endswith(f".{name}") for m in modules)
        }
    return expected | modules
