"""Reading single weights of a base from its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experthub.hub.bases.fingerprint import list_weight_files
from experthub.hub.bases.names import ModelNames, join_pieces
from experthub.hub.errors import HubError
from experthub.hub.formats.safetensors_header import FLOATS, TensorInfo, read_header
from experthub.hub.formats.safetensors_reader import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


def read_stored(folder: Path, names: ModelNames, parameter: str, base: str) -> Tensor:
    """Read a parameter of a model from its folder.

    Args:
        folder: The model folder.
        names: The names of the model's parameters.
        parameter: The name of the parameter.
        base: The name of the base in errors.

    Returns:
        The tensor, in the dtype in which it is stored.

    Raises:
        HubError: The files lack the parameter, or store it quantised.
    """
    places: dict[str, tuple[Path, TensorInfo]] = {
        name: (file, info)
        for file in list_weight_files(folder)
        for name, info in read_header(file).items()
        if info.dtype in FLOATS
    }
    stored = names.tied.get(parameter, parameter)
    if sources := names.find_sources(places).get(stored):
        parts = ((read_tensor(*places[name]), piece) for name, piece in sources)
        return join_pieces(parts, tuple(names.shapes[stored]))
    raise HubError(
        f"base {base} does not store {parameter} as floating-point numbers",
        "use the base in float32, bfloat16 or float16",
    )
