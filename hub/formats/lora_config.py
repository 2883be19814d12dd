"""The `adapter_config.json` of a LoRA: its allowed keys, and the rules of PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection
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
    "runtime_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "ensure_weight_tying",
    "velora_config",  # Only gradients differ.
    "merge_weights",  # peft before 0.4: whether evaluation merges.
}
CONVERT = "run hub convert FOLDER OUT --base BASE, which makes a change of the weights of it"
RETRAIN = "train the adapter again without {key}; no change of the weights computes the same"
# Keys that change the function: the values that do not change it, the reason, and the way out.
REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "use_dora": ((False,), "DoRA scales the rows of the base's weights", CONVERT),
    "layer_replication": (
        (None, []),
        "the adapter belongs to a base with repeated layers, which has other layers than its own",
        "make that base with peft, save it as a model of its own, and use it as the base",
    ),
    "alora_invocation_tokens": (
        (None, []),
        "the adapter acts only after these tokens, which no change of the weights does",
        RETRAIN,
    ),
    "use_qalora": ((None, False), "QALoRA pools the input of each module in groups", RETRAIN),
    "use_bdlora": (
        (None, False),
        "BD-LoRA stores block-diagonal factors",
        "merge the adapter with peft, and store the difference with hub diff",
    ),
    "arrow_config": (
        (None,),
        "the adapter routes between other adapters, which it does not hold",
        "add these adapters one by one, and route them by a recipe of the hub",
    ),
    "kasa_config": ((None,), "KaSA cuts singular values off the base's weights", RETRAIN),
    "monteclora_config": (
        (None,),
        "MonteCLoRA adds a sampled part to the factors",
        "merge the adapter with peft, and store the difference with hub diff",
    ),
    "megatron_config": ((None,), "peft would build modules of Megatron", RETRAIN),
    "megatron_core": ((None, "megatron.core"), "peft would import it", "remove the key"),
    "enable_lora": (
        (None,),
        "peft before 0.3 adapted parts of a fused module by it",
        "merge the adapter with the peft that wrote it, and store the difference with hub diff",
    ),
}
# Initialisations that leave the base as it is. EVA chooses A by data and MiCA chooses B.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)
NEWEST_PEFT = "0.21.2"  # The newest peft whose keys this module knows.

KNOWN = HONOURED | HARMLESS | {"init_lora_weights"}

Token = Annotated[int, Field(ge=0, lt=2**31)]
Rank = Annotated[int, Field(gt=0, lt=1e6)]
Alpha = Annotated[float, Field(gt=0, lt=1e6)]


class _Patterns(BaseModel):
    """The keys of any adapter that hold regular expressions."""

    model_config = ConfigDict(strict=True)

    rank_pattern: dict[Pattern, Any] | None = None
    alpha_pattern: dict[Pattern, Any] | None = None


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
            harmless, reason, hint = REFUSED[key]
            if value not in harmless:
                raise IntegrityError(f"{key} is {short(value)}: {reason}", hint.format(key=key))
        elif key == "auto_mapping":
            _check_base_class(value)
        elif key not in KNOWN and not is_unset(value):
            raise IntegrityError(
                f"unknown key {key[:80]!r} in its configuration{_describe_writer(config)}",
                "correct the key, upgrade experthub if a newer peft wrote the key, or remove the key "
                "if the adapter computes the same without it",
            )
    if not is_plain_init(config.get("init_lora_weights")):
        raise IntegrityError(
            f"init_lora_weights is {short(config['init_lora_weights'])}, which changes the base",
            f"{CONVERT}, or save the adapter with peft's path_initial_model_for_weight_conversion",
        )
    _validate(_HonouredKeys, config)


def check_patterns(config: dict[str, Any]) -> None:
    """Check the regular expressions in the configuration of an adapter of any type.

    Args:
        config: The content of `adapter_config.json`.

    Raises:
        IntegrityError: A key holds something else. The message names the key.
    """
    _validate(_Patterns, config)


def _validate(model: type[BaseModel], config: dict[str, Any]) -> None:
    """Check the types of keys; the error names the first wrong one."""
    try:
        model.model_validate(config)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise IntegrityError(
            f"{key} is {short(config[key])}: {error.errors()[0]['msg']}",
            f"correct {key} in adapter_config.json",
        ) from None


def is_plain_init(value: Any) -> bool:
    """Tell whether a value of init_lora_weights leaves the base's weights as they are.

    Args:
        value: The value.

    Returns:
        True for such a value.
    """
    return (value.lower() if isinstance(value, str) else value) in PLAIN_INITS


def is_unset(value: Any) -> bool:
    """Tell whether a value of a key that is unknown here says that the key is not used.

    Args:
        value: The value.

    Returns:
        True for null, false, and empty texts, lists and objects.
    """
    return value is None or value is False or value in ("", [], {})


def list_ignored_keys(config: dict[str, Any], known: Collection[str] = ()) -> list[str]:
    """List the unknown keys of a configuration that are null, false or empty, and are ignored.

    Args:
        config: The content of `adapter_config.json`.
        known: The keys that other types of adapters have besides those of a LoRA.

    Returns:
        The keys, sorted.
    """
    unknown = config.keys() - KNOWN - REFUSED.keys() - {"auto_mapping"} - set(known)
    return sorted(key for key in unknown if is_unset(config[key]))


def _describe_writer(config: dict[str, Any]) -> str:
    """Say by which peft a configuration was saved, if that peft is newer than the known ones."""
    written = config.get("peft_version")
    numbers = [re.match(r"(\d{1,9})\.(\d{1,9})", str(v)) for v in (written, NEWEST_PEFT)]
    new, known = ((int(n[1]), int(n[2])) if n else (0, 0) for n in numbers)
    return f", saved by peft {str(written)[:20]}, newer than this hub knows" if new > known else ""


def _check_base_class(value: Any) -> None:
    """Reject a class of the base that PEFT would import from elsewhere than transformers."""
    library = value.get("parent_library") if isinstance(value, dict) else value
    if library is not None and not re.fullmatch(r"transformers(\.\w+)*", str(library)):
        raise IntegrityError(
            f"auto_mapping names code: {short(library)}",
            "use a base whose class is in transformers",
        )
