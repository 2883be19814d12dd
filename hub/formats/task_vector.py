"""Task vectors as files, one or several: dense tensors, sparse ones as bits beside the values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    TensorInfo,
    header_text,
    read_header,
)
from experthub.hub.registry.expert import SHARD, SHARD_INDEX, TASK_VECTOR

SHAPES = "hub.shapes"  # metadata: the shapes of sparse parameters, as JSON
CHUNK = 1 << 20
HINT = "write it again with hub diff, or get it again from its source"


@dataclass(frozen=True)
class Stored:
    """How a file holds the change of one parameter.

    file: which of the task vector's files.  shape: of the parameter.  values: the name of the
    tensor with the change, or, where there is a mask, with its entries that are not zero.  mask:
    the name of the tensor of bits.
    """

    file: str
    shape: tuple[int, ...]
    values: str
    mask: str | None = None


def files_in(folder: Path) -> dict[str, Path]:
    """The safetensors files of a folder's task vector, by name.

    Raises IntegrityError for an index that is not exactly that of files `task_vector-00001-of-0000N`.
    """
    index = folder / SHARD_INDEX
    if not index.is_file():
        return {TASK_VECTOR: folder / TASK_VECTOR}
    if (folder / TASK_VECTOR).exists():
        raise _wrong(index, f"{TASK_VECTOR} stands beside it, and one of them is too many")
    places = read_json(index).get("weight_map")
    if not places or not isinstance(places, dict):
        raise _wrong(index, "its weight_map is no object of tensors and files")
    names = sorted(set(map(str, places.values())))
    if names != [SHARD.format(i + 1, len(names)) for i in range(len(names))]:
        raise _wrong(index, f"its weight_map names {short(names)}, not {SHARD.format(1, 1)} and on")
    files = {name: folder / name for name in names}
    held = {tensor: name for name, path in files.items() for tensor in read_header(path)}
    for tensor in sorted(held.keys() | places.keys()):
        if held.get(tensor) != places.get(tensor):
            raise _wrong(
                index,
                f"it has {short(tensor)} in {places.get(tensor, 'no file')}, "
                f"and it is in {held.get(tensor, 'none')}",
            )
    return files


def read_task_vector(files: Mapping[str, Path]) -> dict[str, Stored]:
    """Parameter name -> how its change is stored; IntegrityError for anything else in the files.

    files: by name.  Reads the headers alone; `check_masks` reads the masks.
    """
    found: dict[str, Stored] = {}
    for name, path in files.items():
        stored = _read_file(name, path)
        twice = sorted(found.keys() & stored.keys())
        if twice:
            raise _wrong(path, f"{twice[0]} is there, and in {found[twice[0]].file} too")
        found |= stored
    return dict(sorted(found.items()))


def _read_file(file: str, path: Path) -> dict[str, Stored]:
    header, sparse = read_header(path), _sparse_shapes(path)
    masks = {n.removesuffix(".mask"): n for n, i in header.items() if i.dtype == "U8"}
    values = {f"{name}.values" for name in masks}
    stored = {n: _sparse(file, path, header, n, mask, sparse) for n, mask in masks.items()}
    for name, info in header.items():
        if name in values or info.dtype == "U8":
            continue
        if info.dtype not in FLOATS:
            raise _wrong(path, f"tensor {name} is {info.dtype}, and a change is floats")
        if name in stored:
            raise _wrong(path, f"{name} is there twice, dense and as a mask")
        stored[name] = Stored(file, info.shape, name)
    unused = sorted(set(sparse) - set(masks))
    if unused:
        raise _wrong(path, f"its metadata has a shape for {unused[0]}, which has no mask")
    if not stored:
        raise _wrong(path, "it changes nothing")
    return stored


def _sparse(
    file: str,
    path: Path,
    header: Header,
    name: str,
    mask: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> Stored:
    values = header.get(f"{name}.values")
    if mask != f"{name}.mask" or values is None:
        raise _wrong(path, f"tensor {mask} is U8, and neither a change nor a mask beside values")
    if name not in shapes:
        raise _wrong(path, f"{mask} has no shape under {SHAPES} in the file's metadata")
    count, bits = math.prod(shapes[name]), header[mask]
    if bits.shape != (-(-count // 8),):
        raise _wrong(
            path, f"{mask} is {list(bits.shape)}, and {count} entries need {-(-count // 8)}"
        )
    if values.dtype not in FLOATS or len(values.shape) != 1:
        raise _wrong(
            path, f"{name}.values is {values.dtype} {list(values.shape)}, not a row of floats"
        )
    return Stored(file, shapes[name], f"{name}.values", mask)


def check_masks(path: Path) -> None:
    """Raise IntegrityError for a mask that has other bits than there are values, or bits past the end."""
    header = read_header(path)
    with path.open("rb") as file:
        for stored in _read_file(path.name, path).values():
            if stored.mask is None:
                continue
            info, ones, last = header[stored.mask], 0, b""
            for last in _chunks(file, info):
                ones += int.from_bytes(last).bit_count()
            over = -math.prod(stored.shape) % 8
            if over and last[-1] >> (8 - over):
                raise _wrong(path, f"{stored.mask} has bits set past its last entry")
            if (ones,) != header[stored.values].shape:
                (count,) = header[stored.values].shape
                raise _wrong(path, f"{stored.mask} has {ones} bits set for {count} values")


def _chunks(file: Any, info: TensorInfo) -> Iterator[bytes]:
    file.seek(info.begin)
    left = info.bytes
    while left:
        chunk = file.read(min(left, CHUNK))
        left -= len(chunk)
        yield chunk


def _sparse_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that the metadata states, whose header was checked already."""
    metadata = json.loads(header_text(path)[0]).get("__metadata__", {})
    try:
        stated = json.loads(metadata.get(SHAPES, "{}"))
        shapes = {name: tuple(shape) for name, shape in stated.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise _wrong(path, f"{SHAPES} in its metadata is no JSON object of shapes") from None
    for name, shape in shapes.items():
        if not all(type(side) is int and 0 < side < 1 << 40 for side in shape):
            raise _wrong(path, f"{SHAPES} in its metadata gives {name} the shape {list(shape)}")
    return shapes


def _wrong(path: Path, fact: str) -> IntegrityError:
    return IntegrityError(f"{path}: {fact}", HINT)
