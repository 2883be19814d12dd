"""adapter_config.json of a LoRA: the keys that are honoured, those that are refused, and peft's rules."""

from __future__ import annotations

import re
from reprlib import repr as short
from typing import Annotated, Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.patterns import check_pattern
from experthub.hub.files.spelling import suggest_name
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

# Keys of a LoRA configuration that change nothing, or whose meaning is honoured below.
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
}
HARMLESS = {
    "task_type",
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
# Keys that change the function, with the values under which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
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
PLAIN_INITS = (True, False, "gaussian", "orthogonal", None)


Pattern = Annotated[str, AfterValidator(check_pattern)]
Rank = Annotated[int, Field(gt=0, lt=1e6)]
Alpha = Annotated[float, Field(gt=0, lt=1e6)]


class _Lora(BaseModel):
    """The types of the keys that are honoured."""

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


def check_config(config: dict[str, Any]) -> None:
    """Refuse, by name, whatever would silently change the function that the adapter computes."""
    if config.get("peft_type") != "LORA":
        raise IntegrityError(
            f"peft_type is {short(config.get('peft_type'))}", "only LORA adapters are experts"
        )
    for key, value in config.items():
        if key in REFUSED:
            if value not in REFUSED[key]:
                raise IntegrityError(
                    f"{key} is {short(value)}, which is more than a low-rank change",
                    "merge the adapter with peft and store it as a task vector",
                )
        elif key == "auto_mapping":
            _check_base_class(value)
        elif key not in HONOURED | HARMLESS:
            raise IntegrityError(
                f"unknown key {key[:80]!r} in its configuration",
                suggest_name(key, HONOURED | set(REFUSED)),
            )
    if config.get("init_lora_weights") not in PLAIN_INITS:
        raise IntegrityError(
            f"init_lora_weights is {short(config['init_lora_weights'])}, which changes the base",
            "save it with peft's path_initial_model_for_weight_conversion",
        )
    if config.get("ensure_weight_tying"):
        raise IntegrityError("ensure_weight_tying is set", "train without it")
    try:
        _Lora.model_validate(config)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise IntegrityError(
            f"{key} is {short(config[key])}", f"expected: {error.errors()[0]['msg']}"
        ) from None


def _check_base_class(value: Any) -> None:
    """Refuse a class that peft would import from elsewhere than transformers to load the base."""
    library = value.get("parent_library") if isinstance(value, dict) else value
    if library is not None and not re.fullmatch(r"transformers(\.\w+)*", str(library)):
        raise IntegrityError(
            f"auto_mapping names code: {short(library)}", "only classes of transformers are bases"
        )


def match_pattern(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def is_targeted(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT's target_modules, exclude_modules and layers_to_transform choose the module."""
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
        if found:
            return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _matches(target: Any, module: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)
