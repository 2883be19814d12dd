"""The type of a family of adapters, and the catalogue of all types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Protocol

from experthub.hub.errors import IntegrityError
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.formats.peft_rules import match_pattern
from experthub.merge import Delta
from torch import Tensor

LARGEST = 2**63  # The values of settings are below it; it bounds seeds, too.
DIVISORS = ("r", "init_r", "group_size")
# Keys that the configurations of all types may have, and that change nothing here: which modules
# are adapted is known from the tensors.
COMMON = frozenset(
    {
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "fan_in_fan_out",
        "init_weights",
        "runtime_config",
    }
)


class BaseWeights(Protocol):
    """The weights of the base of an adapter."""

    def weight(self, module: str) -> Tensor:
        """Return the weight of a module as `[O, I]` in float64; an embedding as `[width, tokens]`."""
        ...

    def bias(self, module: str) -> Tensor | None:
        """Return the bias of a module in float64, or None if it has none."""
        ...

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape `(O, I)` of the weight of a module."""
        ...

    def parameter(self, name: str) -> Tensor:
        """Return a parameter as it is stored, in float64."""
        ...


@dataclass(frozen=True)
class AdaptedModule:
    """One module that an adapter changes.

    Args:
        path: The path of the module in the base.
        tensors: The tensors of the module by their names in it, in float64.
        shared: The tensors that all modules share, in float64.
        config: The content of `adapter_config.json`.
        base: The weights of the base. They are read only by types that need the base.
        others: The paths of all modules that the adapter changes.
        initial: The tensors of the module before the training, if they are known.
    """

    path: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    config: Mapping[str, Any]
    base: BaseWeights
    others: tuple[str, ...] = ()
    initial: Mapping[str, Tensor] | None = None

    def setting(self, key: str, default: Any, pattern: str = "") -> Any:
        """Return a setting of this module.

        Args:
            key: The key of the configuration.
            default: The value if the key is absent.
            pattern: The key of the values by regular expression, which win.

        Returns:
            The value.

        Raises:
            IntegrityError: The value has another type than the default, or a pattern takes too long.
        """
        value = self.config.get(key, default)
        patterns = self.config.get(pattern)
        if patterns:
            try:
                with limit_matching_time():
                    value = match_pattern(patterns, self.path, value)
            except (TimeoutError, re.error) as error:
                raise IntegrityError(
                    f"{pattern} in its configuration cannot be used: {error}",
                    f"simplify {pattern} in adapter_config.json",
                ) from None
        if not _fits(key, value, default):
            raise IntegrityError(
                f"{key} is {short(value)} for {self.path}", f"correct {key} in adapter_config.json"
            )
        return value


def _fits(key: str, value: Any, default: Any) -> bool:
    """Tell whether the value of a setting can stand in place of its default."""
    if isinstance(default, bool) or not isinstance(default, int | float):
        return isinstance(value, type(default)) or (value is None and default is False)
    whole = isinstance(default, int) and not key.endswith("alpha")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return abs(value) < LARGEST and (value > 0 or key not in DIVISORS)


@dataclass(frozen=True)
class AdapterType:
    """A type of adapters, whose change of each weight is a closed form.

    Args:
        name: The `peft_type` of the configuration.
        tensors: The names of the tensors of a module, some of which may be absent.
        change: A function that returns the change of a module's weight, `[O, I]` in float64.
        keys: The keys of the configuration besides `COMMON`, all of which are read or harmless.
        fixed: The keys that must have one of some values, with these values and a reason.
        shared: The names of tensors outside of modules.
        low_rank: Whether the change is returned as `LowRank`.
        needs_base: Whether `change` needs the base: its weights, or the shapes of modules that the
            tensors do not tell.
        bias: A function that returns the change of a module's bias, or None.
        ignored: Endings of names of tensors that only training uses.
    """

    name: str
    tensors: tuple[str, ...]
    change: Callable[[AdaptedModule], Delta]
    keys: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[tuple[Any, ...], str]] | None = None
    shared: tuple[str, ...] = ()
    low_rank: bool = False
    needs_base: bool = False
    bias: Callable[[AdaptedModule], Tensor | None] = lambda module: None
    ignored: tuple[str, ...] = ()


adapter_types: dict[str, AdapterType] = {}


def register(kind: AdapterType) -> None:
    """Add a type to the catalogue.

    Args:
        kind: The type.
    """
    adapter_types[kind.name] = kind
