"""The intermediate form of every format: a configuration and tensors as peft names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from experthub.hub.conversion.found_adapter import WRAPPERS
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.dense_parts import PREFIX
from torch import Tensor

FACTORS = r"(?:lora|vera|hada|lokr|ia3|oft|boft|hra|fourierft|vblora|c3a|randlora|shira|miss|delora|road|hira)"
# A tensor of a module, with the name of the adapter that peft leaves out when it saves.
NAMED = re.compile(
    rf"(.*\.({FACTORS}_\w+|ln_tuning_layers))\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?"
)


@dataclass(frozen=True)
class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each of which is read when it is asked for.

    Args:
        readers: A function for each name.
    """

    readers: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.readers)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.readers)


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter after its format was read.

    Args:
        name: The path of the adapter, for errors.
        config: Its configuration as peft writes it.
        tensors: Its tensors under peft's names, with the prefix and without wrappers.
        notes: Facts that the user should know.
    """

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    notes: list[str] = field(default_factory=list)


def normalise_names(names: Iterable[str], adapter: str | None, place: str) -> dict[str, str]:
    """Bring the names of tensors into the form that peft saves.

    Args:
        names: The names in the file.
        adapter: The adapter to choose, if the file holds several.
        place: The file, for errors.

    Returns:
        Normal name -> name in the file.

    Raises:
        IntegrityError: The file holds several adapters and none is chosen, or two tensors have one
            name.
    """
    names = list(names)
    strip = all(name.startswith("module.") for name in names)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        plain = ".".join(parts[1:] if strip else parts)
        plain = plain.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        if not plain.startswith("base_model."):
            plain = PREFIX + plain
        match = NAMED.fullmatch(plain)
        if match:
            owners[name] = match[3]
            plain = match[1] + (match[4] or "")
        if adapter and owners.get(name, adapter) != adapter:
            continue
        if plain in found and owners.get(name) == owners.get(found[plain]):
            raise IntegrityError(
                f"{place}: {name} and {found[plain]} are one tensor",
                "save the adapter again with peft's save_pretrained",
            )
        found[plain] = name
    held = sorted(set(owners.values()))
    if adapter and adapter not in held:
        raise IntegrityError(
            f"{place} holds no adapter {adapter!r}", f"choose one of: {', '.join(held) or 'none'}"
        )
    if not adapter and len(held) > 1:
        raise IntegrityError(
            f"{place} holds {len(held)} adapters: {', '.join(held)}",
            "choose one with hub convert FOLDER OUT --adapter NAME",
        )
    return found


def sort_patterns(values: Mapping[str, float]) -> dict[str, float]:
    """Return values by module as patterns of peft, which takes the first that fits a path's end.

    Args:
        values: A value for each path.

    Returns:
        The values by regular expression, with longer paths first.
    """
    return {re.escape(path): values[path] for path in sorted(values, key=len, reverse=True)}
