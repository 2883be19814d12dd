"""Reading single weights of a base from its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experthub.hub.bases.fingerprint import list_weight_files
from experthub.hub.errors import HubError
from experthub.hub.formats.safetensors_header import FLOATS, read_header
from experthub.hub.formats.safetensors_reader import read_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def read_stored(folder: Path, name: str, tied: Mapping[str, str], base: str) -> Tensor:
    """Read a parameter of a model folder.

    Args:
        folder: The model folder.
        name: The name of the parameter.
        tied: The parameters that are not stored, each with the one whose weights it shares.
        base: The name of the base in errors.

    Returns:
        The tensor, in the dtype in which it is stored.

    Raises:
        HubError: The files lack the parameter, or store it quantised.
    """
    stored = tied.get(name, name)
    for file in list_weight_files(folder):
        info = read_header(file).get(stored)
        if info is not None and info.dtype in FLOATS:
            return read_tensor(file, info)
    raise HubError(
        f"base {base} does not store {name} as floating-point numbers",
        "use the base in float32, bfloat16 or float16",
    )
