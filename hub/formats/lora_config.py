"""The `adapter_config.json` of a LoRA: its allowed keys, and the rules of PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from reprlib import repr as short
from typing import Annotated, Any, Literal

from experthub.hub.errors import IntegrityError
from experthub.hub.formats.records import Pattern
from pydantic import BaseModel, ConfigDict, Field, ValidationError

# Keys that are read: by this module, or by `adapter`.
HONOURED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "task_type",
    "target_parameters",
}
# Keys that do not change the function that the adapter computes.
HARMLESS = {
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "runtime_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "ensure_weight_tying",
}
# Keys that change the function, with the values that do not change it.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
OUTPUTS = ("lm_head", "embed_out", "proj_out")
PLAIN_INITS = (True, False, "gaussian", "orthogonal", None)

Token = Annotated[int, Field(ge=0, lt=2**31)]
Rank = Annotated[int, Field(gt=0, lt=1e6)]
Alpha = Annotated[float, Field(gt=0, lt=1e6)]


class _HonouredKeys(BaseModel):
    """The types of the keys that are read."""

    model_config = ConfigDict(strict=True)

    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = False
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Alpha] | None = None
    fan_in_fan_out: bool | None = False
    target_modules: Pattern | list[str] | None = None
    exclude_modules: Pattern | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Pattern | list[Pattern] | None = None
    bias: Literal["none", "all", "lora_only"] | None = "none"
    lora_bias: bool | None = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[Token] | dict[str, list[Token]] | None = None
    target_parameters: list[str] | None = None


def check_config(config: dict[str, Any]) -> None:
    """Reject a configuration that asks for more than a plain low-rank change.

    Args:
        config: The content of `adapter_config.json`.

    Raises:
        IntegrityError: A key is unknown, has a wrong type, or would change the function that the
            adapter computes. The message names the key.
    """
    if config.get("peft_type") != "LORA":
        raise IntegrityError(
            f"peft_type is {short(config.get('peft_type'))}",
            "use a LoRA adapter, with peft_type LORA",
        )
    for key, value in config.items():
        if key in REFUSED:
            if value not in REFUSED[key]:
                raise IntegrityError(
                    f"{key} is {short(value)}, which is more than a low-rank change",
                    "merge the adapter with peft, and store the difference as a task vector",
                )
        elif key == "auto_mapping":
            _check_base_class(value)
        elif key not in HONOURED | HARMLESS:
            raise IntegrityError(
                f"unknown key {key[:80]!r} in its configuration",
                "correct the key, upgrade experthub if a newer peft wrote the key, or remove the key "
                "if the adapter computes the same without it",
            )
    if config.get("init_lora_weights") not in PLAIN_INITS:
        raise IntegrityError(
            f"init_lora_weights is {short(config['init_lora_weights'])}, which changes the base",
            "save the adapter with peft's path_initial_model_for_weight_conversion",
        )
    try:
        _HonouredKeys.model_validate(config)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise IntegrityError(
            f"{key} is {short(config[key])}: {error.errors()[0]['msg']}",
            f"correct {key} in adapter_config.json",
        ) from None


def _check_base_class(value: Any) -> None:
    """Reject a class of the base that PEFT would import from elsewhere than transformers."""
    library = value.get("parent_library") if isinstance(value, dict) else value
    if library is not None and not re.fullmatch(r"transformers(\.\w+)*", str(library)):
        raise IntegrityError(
            f"auto_mapping names code: {short(library)}",
            "use a base whose class is in transformers",
        )


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
