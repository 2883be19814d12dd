"""Adapters in safetensors files with the names of peft, or nearly so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experthub.hub.conversion.foreign_adapter import ForeignAdapter, LazyTensors, normalise_names
from experthub.hub.conversion.found_adapter import FoundAdapter
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.safetensors_header import check_finite, read_header
from experthub.hub.formats.safetensors_reader import read_tensor
from torch import Tensor


def open_tensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    """Open a safetensors file after checking it.

    Args:
        path: The file.

    Returns:
        A function for each tensor, which reads it.

    Raises:
        IntegrityError: The file is damaged, or holds NaN or infinity.
    """
    header = read_header(path)
    check_finite(path, header)
    return {name: partial(read_tensor, path, info) for name, info in header.items()}


def read(found: FoundAdapter, adapter: str | None = None) -> ForeignAdapter:
    """Read an adapter of peft.

    Args:
        found: The adapter.
        adapter: The adapter to choose, if the file holds several.

    Returns:
        The adapter with normal names.

    Raises:
        IntegrityError: The file is damaged, or has no configuration and needs one.
    """
    return make_adapter(open_tensors(found.weights), found, adapter)


def make_adapter(
    readers: Mapping[str, Callable[[], Tensor]], found: FoundAdapter, adapter: str | None = None
) -> ForeignAdapter:
    """Bring tensors with peft's names into their normal form.

    Args:
        readers: A function for each tensor.
        found: The adapter.
        adapter: The adapter to choose, if the tensors belong to several.

    Returns:
        The adapter.

    Raises:
        IntegrityError: There is no configuration.
    """
    name = str(found.folder if found.config else found.weights)
    config: dict[str, Any] = dict(found.config)
    if not config:
        raise IntegrityError(
            f"{name} has no adapter_config.json, which states the scale of the adapter",
            "copy adapter_config.json of the training beside the file",
        )
    normal = normalise_names(readers, adapter, name)
    notes = []
    if any(plain != stored for plain, stored in normal.items()):
        notes.append("renamed its tensors to the names that peft saves")
    return ForeignAdapter(
        name, config, LazyTensors({plain: readers[at] for plain, at in normal.items()}), notes
    )
