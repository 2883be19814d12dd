"""The files of a task vector: dense tensors, and sparse ones as a bit mask with values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING

from experthub.hub.errors import IntegrityError
from experthub.hub.files.digests import read_chunks
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    check_shape,
    read_header,
    read_header_text,
)

if TYPE_CHECKING:
    from torch import Tensor

TASK_VECTOR = "task_vector.safetensors"
SHARD = "task_vector-{:05d}-of-{:05d}.safetensors"
SHARD_INDEX = "task_vector.safetensors.index.json"
NUMBER = "[0-9]" * 5
SHARDS = f"task_vector-{NUMBER}-of-{NUMBER}.safetensors"
SHAPES = "hub.shapes"  # The key of the metadata that has the shapes of sparse parameters as JSON.
HINT = "write it again with hub diff, or get it again from its source"


@dataclass(frozen=True)
class StoredChange:
    """The place of one parameter's change in the files.

    Args:
        file: The name of the file.
        shape: The shape of the parameter.
        values: The name of the tensor that holds the change. With a mask, it holds only the entries
            that are not zero.
        mask: The name of the tensor of bits, one per entry of the parameter. None for a dense
            change.
    """

    file: str
    shape: tuple[int, ...]
    values: str
    mask: str | None = None


def find_files(folder: Path) -> dict[str, Path]:
    """Find the safetensors files of the task vector in a folder.

    Args:
        folder: A folder with one file, or with several files and their index.

    Returns:
        The paths by file name.

    Raises:
        IntegrityError: The index does not match the files `task_vector-00001-of-0000N` exactly.
    """
    index = folder / SHARD_INDEX
    if not index.is_file():
        return {TASK_VECTOR: folder / TASK_VECTOR}
    if (folder / TASK_VECTOR).exists():
        raise _malformed(index, f"{TASK_VECTOR} stands beside it, and only one of them may exist")
    places = read_json(index).get("weight_map")
    if not places or not isinstance(places, dict):
        raise _malformed(index, "its weight_map does not map tensors to files")
    names = sorted(set(map(str, places.values())))
    if names != [SHARD.format(i + 1, len(names)) for i in range(len(names))]:
        raise _malformed(
            index, f"its weight_map names {short(names)}, expected {SHARD.format(1, 1)} and so on"
        )
    files = {name: folder / name for name in names}
    held = {tensor: name for name, path in files.items() for tensor in read_header(path)}
    for tensor in sorted(held.keys() | places.keys()):
        if held.get(tensor) != places.get(tensor):
            raise _malformed(
                index,
                f"it has {short(tensor)} in {places.get(tensor, 'no file')}, "
                f"but the tensor is in {held.get(tensor, 'no file')}",
            )
    return files


def read_task_vector(files: Mapping[str, Path]) -> dict[str, StoredChange]:
    """Read where the files of a task vector hold the change of each parameter.

    Only headers are read. `check_masks` reads the masks.

    Args:
        files: The paths by file name.

    Returns:
        The place of each parameter's change, sorted by parameter.

    Raises:
        IntegrityError: The files hold other tensors, or one change twice.
    """
    found: dict[str, StoredChange] = {}
    for name, path in files.items():
        stored = _read_file(name, path)
        twice = sorted(found.keys() & stored.keys())
        if twice:
            raise _malformed(path, f"it has {twice[0]}, and {found[twice[0]].file} has it, too")
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
            raise _malformed(path, f"tensor {name} is {info.dtype}, and changes are floats")
        if name in stored:
            raise _malformed(path, f"it has {name} twice, dense and with a mask")
        stored[name] = StoredChange(file, info.shape, name)
    unused = sorted(set(sparse) - set(masks))
    if unused:
        raise _malformed(path, f"its metadata has a shape for {unused[0]}, which has no mask")
    if not stored:
        raise _malformed(path, "it changes nothing")
    return stored


def _read_sparse(
    file: str,
    path: Path,
    header: Header,
    name: str,
    mask: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> StoredChange:
    """Return the place of a sparse change after checking its mask against its values."""
    values = header.get(f"{name}.values")
    if mask != f"{name}.mask" or values is None:
        raise _malformed(path, f"tensor {mask} is U8, but neither a change nor a mask with values")
    if name not in shapes:
        raise _malformed(path, f"its metadata has no shape of {mask} under {SHAPES}")
    count, bits = math.prod(shapes[name]), header[mask]
    if bits.shape != (-(-count // 8),):
        raise _malformed(
            path, f"{mask} is {list(bits.shape)}, and {count} entries need {-(-count // 8)}"
        )
    if values.dtype not in FLOATS or len(values.shape) != 1:
        raise _malformed(
            path, f"{name}.values is {values.dtype} {list(values.shape)}, not a vector of floats"
        )
    return StoredChange(file, shapes[name], f"{name}.values", mask)


def check_masks(path: Path) -> None:
    """Check that every mask of a file has as many set bits as there are values.

    Args:
        path: The path of the file.

    Raises:
        IntegrityError: A mask has another number of set bits, or set bits after its last entry.
    """
    header = read_header(path)
    with path.open("rb") as file:
        for stored in _read_file(path.name, path).values():
            if stored.mask is None:
                continue
            info, ones, last = header[stored.mask], 0, b""
            for last in read_chunks(file, info.begin, info.bytes):
                ones += int.from_bytes(last).bit_count()
            over = -math.prod(stored.shape) % 8
            if over and last and last[-1] >> (8 - over):
                raise _malformed(path, f"{stored.mask} has bits set past its last entry")
            if (ones,) != header[stored.values].shape:
                (count,) = header[stored.values].shape
                raise _malformed(path, f"{stored.mask} has {ones} bits set for {count} values")


def unpack_mask(mask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack a sparse change.

    Args:
        mask: One bit per entry of the parameter, the lowest bit of each byte first, uint8.
        values: The entries whose bit is set, in order.
        shape: The shape of the parameter.

    Returns:
        A tensor of this shape with the values, and zeros elsewhere.
    """
    import torch

    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    found = torch.zeros(math.prod(shape), dtype=values.dtype)
    found[bits.flatten()[: len(found)].bool()] = values
    return found.view(shape)


def _read_sparse_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of sparse parameters from the metadata of a checked header."""
    metadata = json.loads(read_header_text(path)[0]).get("__metadata__") or {}
    try:
        stated = json.loads(metadata.get(SHAPES, "{}"))
        shapes = {name: tuple(shape) for name, shape in stated.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise _malformed(path, f"{SHAPES} in its metadata is not a JSON object of shapes") from None
    for name, shape in shapes.items():
        try:
            check_shape(short(name), shape)
            if 0 in shape:
                raise ValueError(f"tensor {short(name)} has no entries")
        except ValueError as fact:
            raise _malformed(path, f"{SHAPES} in its metadata: {fact}") from None
    return shapes


def _malformed(path: Path, fact: str) -> IntegrityError:
    """Return the error for a malformed file."""
    return IntegrityError(f"{path}: {fact}", HINT)
