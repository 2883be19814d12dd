"""The rules of PEFT by which a configuration selects modules and gives them a rank and a scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

OUTPUTS = ("lm_head", "embed_out", "proj_out")


def match_pattern(pattern: Any, module: str, default: Any) -> Any:
    """Look up the value for a module by PEFT's rule: the first pattern that matches its path's end.

    Args:
        pattern: The values by regular expression, or None.
        module: The path of the module.
        default: The value for a module that no pattern matches.

    Returns:
        The value.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def find_rank_and_scale(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Find the rank and the scale that a configuration states for a module or a parameter.

    Args:
        config: The content of `adapter_config.json`.
        path: The path of the module or the parameter.

    Returns:
        The rank, and `alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA.
    """
    rank = match_pattern(config.get("rank_pattern"), path, config.get("r", 8))
    alpha = match_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_targeted(config: dict[str, Any], module: str) -> bool:
    """Tell whether PEFT's target_modules, exclude_modules and layers_to_transform select a module.

    Args:
        config: The content of `adapter_config.json`.
        module: The path of the module.

    Returns:
        Whether the module is adapted.
    """
    if config.get("ensure_weight_tying") and module.endswith(OUTPUTS):
        return True  # PEFT adapts the output embedding that is tied to a target.
    exclude = config.get("exclude_modules")
    if exclude and _matches(exclude, module):
        return False
    target = config.get("target_modules")
    if target is None or target == "all-linear":
        return True
    if not _matches(target, module):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(target, str) or module in target:
        return True
    named = config.get("layers_pattern") or []
    places = [rf"(?:^|.*?\.){p}" for p in ([named] if isinstance(named, str) else named)]
    for place in places or [r".*?\.[^.]*"]:
        found = re.match(rf"{place}\.(?P<idx>\d+)\.", module)
        if found:  # An alternative of the pattern may match without the number.
            return found["idx"] is not None and int(found["idx"]) in (
                [layers] if isinstance(layers, int) else layers
            )
    return False


def list_targeted_leaves(config: dict[str, Any], module: str) -> list[str]:
    """List the parameters of a module that PEFT's target_parameters may select.

    Args:
        config: The content of `adapter_config.json`.
        module: The path of the module.

    Returns:
        The names of the parameters in the module, sorted. The module need not have all of them.
    """
    found = set()
    for target in config.get("target_parameters") or ():
        owner, _, leaf = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.add(leaf)
    return sorted(found)


def _matches(target: Any, module: str) -> bool:
    """Tell whether a regular expression or a list of names selects a module."""
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)
