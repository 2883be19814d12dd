"""The files of a task vector: dense tensors, and sparse ones as a bit mask beside the values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import IntegrityError
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    TensorInfo,
    read_header,
    read_header_text,
)

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = "hub.shapes"  # metadata: the shapes of sparse parameters, as JSON
CHUNK = 1 << 20
HINT = "write it again with hub diff, or get it again from its source"


@dataclass(frozen=True)
class StoredChange:
    """The place of one parameter's change in the files.

    Args:
        file: The name of the file.
        shape: The parameter's shape.
        values: The tensor with the change, or with its entries that are not zero if there is a mask.
        mask: The tensor of bits, one per entry of the parameter.
    """

    file: str
    shape: tuple[int, ...]
    values: str
    mask: str | None = None


def read_task_vector(files: Mapping[str, Path]) -> dict[str, StoredChange]:
    """Read where a task vector's files hold the change of each parameter.

    Only headers are read; `check_masks` reads the masks.

    Args:
        files: File name -> path.

    Returns:
        Parameter name -> the place of its change, sorted by name.

    Raises:
        IntegrityError: The files hold anything else than changes, or one change twice.
    """
    found: dict[str, StoredChange] = {}
    for name, path in files.items():
        stored = _read_file(name, path)
        twice = sorted(found.keys() & stored.keys())
        if twice:
            raise malformed(path, f"{twice[0]} is there, and in {found[twice[0]].file} too")
        found |= stored
    return dict(sorted(found.items()))


def _read_file(file: str, path: Path) -> dict[str, StoredChange]:
    """Read where one file holds changes."""
    header, sparse = read_header(path), _read_sparse_shapes(path)
    masks = {n.removesuffix(".mask"): n for n, i in header.items() if i.dtype == "U8"}
    values = {f"{name}.values" for name in masks}
    stored = {n: _read_sparse(file, path, header, n, mask, sparse) for n, mask in masks.items()}
    for name, info in header.items():
        if name in values or info.dtype == "U8":
            continue
        if info.dtype not in FLOATS:
            raise malformed(path, f"tensor {name} is {info.dtype}, and a change is floats")
        if name in stored:
            raise malformed(path, f"{name} is there twice, dense and as a mask")
        stored[name] = StoredChange(file, info.shape, name)
    unused = sorted(set(sparse) - set(masks))
    if unused:
        raise malformed(path, f"its metadata has a shape for {unused[0]}, which has no mask")
    if not stored:
        raise malformed(path, "it changes nothing")
    return stored


def _read_sparse(
    file: str,
    path: Path,
    header: Header,
    name: str,
    mask: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> StoredChange:
    """Return the place of a sparse change, after checking the mask against the values."""
    values = header.get(f"{name}.values")
    if mask != f"{name}.mask" or values is None:
        raise malformed(path, f"tensor {mask} is U8, and neither a change nor a mask beside values")
    if name not in shapes:
        raise malformed(path, f"{mask} has no shape under {SHAPES} in the file's metadata")
    count, bits = math.prod(shapes[name]), header[mask]
    if bits.shape != (-(-count // 8),):
        raise malformed(
            path, f"{mask} is {list(bits.shape)}, and {count} entries need {-(-count // 8)}"
        )
    if values.dtype not in FLOATS or len(values.shape) != 1:
        raise malformed(
            path, f"{name}.values is {values.dtype} {list(values.shape)}, not a row of floats"
        )
    return StoredChange(file, shapes[name], f"{name}.values", mask)


def check_masks(path: Path) -> None:
    """Check that every mask of a file has as many bits set as there are values.

    Args:
        path: The file.

    Raises:
        IntegrityError: A mask has another number of bits, or bits after its last entry.
    """
    header = read_header(path)
    with path.open("rb") as file:
        for stored in _read_file(path.name, path).values():
            if stored.mask is None:
                continue
            info, ones, last = header[stored.mask], 0, b""
            for last in _read_chunks(file, info):
                ones += int.from_bytes(last).bit_count()
            over = -math.prod(stored.shape) % 8
            if over and last[-1] >> (8 - over):
                raise malformed(path, f"{stored.mask} has bits set past its last entry")
            if (ones,) != header[stored.values].shape:
                (count,) = header[stored.values].shape
                raise malformed(path, f"{stored.mask} has {ones} bits set for {count} values")


def unpack_mask(mask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack a sparse change.

    Args:
        mask: One bit per entry of the parameter, the lowest bit of each byte first, uint8.
        values: The entries whose bit is set, in their order.
        shape: The parameter's shape.

    Returns:
        A tensor of this shape that holds the values, and zeros elsewhere.
    """
    import torch

    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    found = torch.zeros(math.prod(shape), dtype=values.dtype)
    found[bits.flatten()[: len(found)].bool()] = values
    return found.view(shape)


def _read_chunks(file: Any, info: TensorInfo) -> Iterator[bytes]:
    """Read the bytes of a tensor piece by piece."""
    file.seek(info.begin)
    left = info.bytes
    while left:
        chunk = file.read(min(left, CHUNK))
        left -= len(chunk)
        yield chunk


def _read_sparse_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of sparse parameters from the metadata; the header was checked before."""
    metadata = json.loads(read_header_text(path)[0]).get("__metadata__", {})
    try:
        stated = json.loads(metadata.get(SHAPES, "{}"))
        shapes = {name: tuple(shape) for name, shape in stated.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise malformed(path, f"{SHAPES} in its metadata is no JSON object of shapes") from None
    for name, shape in shapes.items():
        if not all(type(side) is int and 0 < side < 1 << 40 for side in shape):
            raise malformed(path, f"{SHAPES} in its metadata gives {name} the shape {list(shape)}")
    return shapes


def malformed(path: Path, fact: str) -> IntegrityError:
    """Return the error for a malformed file."""
    return IntegrityError(f"{path}: {fact}", HINT)
