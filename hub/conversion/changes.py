"""The changes of weights that an adapter of any type makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from reprlib import repr as short

from experthub.hub.conversion.base_weights import StoredBase
from experthub.hub.conversion.foreign_adapter import ForeignAdapter
from experthub.hub.conversion.peft_types import AdaptedModule, AdapterType, adapter_types
from experthub.hub.conversion.peft_types.adapter_type import COMMON
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.formats.lora_config import (
    NEWEST_PEFT,
    check_patterns,
    is_unset,
    list_ignored_keys,
)
from experthub.merge import Delta
from torch import Tensor

MERGE = (
    "merge the adapter with peft, and store the difference with hub diff BASE MERGED --name NAME"
)
# Types that are no change of the weights, and the reason.
NOT_WEIGHTS = {
    "MULTITASK_PROMPT_TUNING": "it adds trained tokens before the input",
    "CPT": "it adds trained tokens before the input",
    "CARTRIDGE": "it adds trained keys and values to every attention layer",
    "ADAPTION_PROMPT": "it adds trained tokens inside of attention layers",
    "POLY": "its change depends on the task of each example",
    "XLORA": "it routes between other adapters, which it does not hold",
}
TRAIN_LORA = "train a LoRA instead: hub train lora, or peft's LoraConfig"


@dataclass(frozen=True)
class Changes:
    """The changes that an adapter makes, none of which is computed yet.

    Args:
        adapter: The adapter.
        kind: Its type.
        modules: The changed modules by path.
        dense: The tensors that replace a parameter: parameter -> name of the tensor.
    """

    adapter: ForeignAdapter
    kind: AdapterType
    modules: Mapping[str, AdaptedModule]
    dense: Mapping[str, str]

    def compute(self) -> Iterator[tuple[str, Delta]]:
        """Compute the change of each module's weight.

        Yields:
            The path of the module, and the change as `[O, I]` in float64.
        """
        for path, module in self.modules.items():
            yield path, self.kind.change(module)


def find_type(adapter: ForeignAdapter) -> AdapterType:
    """Find the type of an adapter, and check its configuration.

    Args:
        adapter: The adapter.

    Returns:
        The type.

    Raises:
        IntegrityError: The type, or a key of the configuration, has no known change of weights.
    """
    config = adapter.config
    name = str(config.get("peft_type", "LORA")).upper()
    if name in NOT_WEIGHTS:
        raise IntegrityError(
            f"{adapter.name}: peft_type is {name}, which is no change of the weights: "
            f"{NOT_WEIGHTS[name]}",
            TRAIN_LORA,
        )
    if name == "LORA" and (config.get("use_dora") or config.get("lora_bias")):
        name = "LORA_DENSE"
    kind = adapter_types.get(name)
    if kind is None:
        raise IntegrityError(
            f"{adapter.name}: peft_type is {short(config.get('peft_type'))}, which the hub cannot convert",
            MERGE,
        )
    for key, value in config.items():
        values, reason = (kind.fixed or {}).get(key, ((), ""))
        if reason and value not in values:
            raise IntegrityError(f"{adapter.name}: {key} is {short(value)}: {reason}", MERGE)
    check_keys(adapter, name, COMMON | kind.keys | set(kind.fixed or {}))
    try:
        check_patterns(config)
    except IntegrityError as error:
        raise IntegrityError(f"{adapter.name}: {error.message}", error.hint) from None
    return kind


def check_keys(adapter: ForeignAdapter, name: str, known: Set[str]) -> None:
    """Refuse keys of a configuration that are set and not known.

    Args:
        adapter: The adapter.
        name: Its type.
        known: The keys that are read or harmless.

    Raises:
        IntegrityError: A key is not known.
    """
    for key, value in adapter.config.items():
        if key not in known and not is_unset(value):
            raise IntegrityError(
                f"{adapter.name}: unknown key {key[:80]!r} of {name}; the hub knows peft {NEWEST_PEFT}",
                "upgrade experthub, or remove the key if the adapter computes the same without it",
            )


def read_changes(
    adapter: ForeignAdapter, base: StoredBase, initial: ForeignAdapter | None = None
) -> Changes:
    """Group the tensors of an adapter by the modules that they change.

    Args:
        adapter: The adapter.
        base: The weights of its base.
        initial: The same adapter before its training, for initialisations that changed the base.

    Returns:
        The changes.

    Raises:
        IntegrityError: The type is unknown, or a module lacks a tensor.
    """
    kind = find_type(adapter)
    known = COMMON | kind.keys | set(kind.fixed or {})
    ignored = list_ignored_keys(adapter.config, known)
    if ignored:
        adapter.notes.append(f"ignored the unused keys {', '.join(ignored)}")
    groups, rest = _group(adapter.tensors, kind)
    before, _ = _group(initial.tensors, kind) if initial else ({}, {})
    if not groups:
        raise IntegrityError(
            f"{adapter.name}: peft_type is {short(adapter.config.get('peft_type'))}, "
            "and the file holds no tensors of it",
            "check that the file is complete",
        )
    shared = {
        name: adapter.tensors[at].double() for name, at in rest.items() if name in kind.shared
    }
    modules = {}
    for path, places in sorted(groups.items()):
        modules[path] = AdaptedModule(
            path,
            _Doubled(adapter.tensors, places, f"{adapter.name}: {path}"),
            shared,
            adapter.config,
            base,
            tuple(groups),
            _Doubled(initial.tensors, before[path], initial.name)
            if initial and path in before
            else None,
        )
    dense = {name.removeprefix(PREFIX): at for name, at in rest.items() if name not in kind.shared}
    return Changes(adapter, kind, modules, dense)


def _group(
    tensors: Mapping[str, Tensor], kind: AdapterType
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the tensors of each module by their names in it, and the other tensors."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    rest: dict[str, str] = {}
    for name in tensors:
        own = next((t for t in kind.tensors if name.endswith(f".{t}")), None)
        if own and name.startswith(PREFIX):
            groups[name.removeprefix(PREFIX).removesuffix(f".{own}")][own] = name
        elif not any(f".{ending}" in name for ending in kind.ignored):
            plain = name.replace(".base_layer.", ".").removeprefix("base_model.")
            rest[plain if plain in kind.shared else name.replace(".base_layer.", ".")] = name
    return dict(groups), rest


@dataclass(frozen=True)
class _Doubled(Mapping[str, Tensor]):
    """The tensors of one module, which are read in float64 when they are needed."""

    tensors: Mapping[str, Tensor]
    places: Mapping[str, str]
    owner: str

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.places:
            raise KeyError(name)
        found = self.tensors[self.places[name]]
        return found.double() if found.is_floating_point() else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
