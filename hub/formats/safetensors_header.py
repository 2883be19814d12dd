"""Reading safetensors headers, with checks that the format's own reader does not make.

No tensor library is needed: names, dtypes, shapes and finiteness are read from the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from types import MappingProxyType
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.digests import CHUNK, read_chunks

MAX_HEADER = 8 << 20
MAX_TENSORS = 100_000
MAX_SIDES = 32
MAX_THREADS = 8
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,1000}")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
SIZES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8}
FLOATS = ("F64", "F32", "F16", "BF16")
# The bits, without the sign, of the first number that is infinity or NaN; larger bits are NaN, too.
# For float64 it is the first number that is infinity in float32, in which the hub computes.
TOO_LARGE = {
    "F64": ("<u8", 0x47EF_FFFF_F000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
HINT = "get the file again from its source, or save it again with safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """The declaration of a tensor in a header.

    Args:
        dtype: The dtype, such as `F32`.
        shape: The shape.
        begin: The first byte of the tensor, counted from the start of the file.
        end: The byte after the last one.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.end - self.begin


Header = Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Args:
        path: The path of the file.

    Returns:
        The declarations of the tensors by name.

    Raises:
        IntegrityError: The file is not exactly one well-formed file. Examples are a pickle, a cut
            or padded file, an oversized header, duplicate or invalid names, unknown dtypes, gaps.
    """
    text, size = read_header_text(path)
    try:
        return parse_header(text, size)
    except ValueError as fact:
        raise IntegrityError(f"{path} is damaged: {fact}", HINT) from None


def read_header_text(path: Path) -> tuple[bytes, int]:
    """Read the bytes of a header.

    Args:
        path: The path of the safetensors file.

    Returns:
        The header as bytes, and the size of the file.

    Raises:
        IntegrityError: The path is not a file, the file is a pickle, or the header is too long.
    """
    if not path.is_file():  # Reading from a pipe could block forever.
        raise IntegrityError(f"{path} is not a file", HINT)
    size = path.stat().st_size
    with path.open("rb") as file:
        return file.read(_parse_length(file.read(8), size, str(path))), size


def _parse_length(start: bytes, size: int, name: str) -> int:
    """Parse the length of a header from the first 8 bytes of a file."""
    length: int = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if 2 <= length <= min(MAX_HEADER, size - 8):  # This is checked first: 640 is b"\x80\x02...".
        return length
    if start[:2] in PICKLE_STARTS:
        raise IntegrityError(
            f"{name} is a pickle, not safetensors", "save the weights again as safetensors"
        )
    raise IntegrityError(f"{name} is damaged: header of {length} bytes in a file of {size}", HINT)


@lru_cache(maxsize=64)
def parse_header(text: bytes, size: int) -> Header:
    """Parse a header. The result is cached: experts of equal shapes have equal headers.

    Args:
        text: The bytes of the header.
        size: The size of the file in bytes.

    Returns:
        The declarations of the tensors by name.

    Raises:
        ValueError: The header is malformed, or its tensors are not exactly the bytes of the file.
    """
    length = len(text)
    try:
        fields = json.loads(
            text.decode(), object_pairs_hook=_reject_duplicates, parse_constant=_reject_constant
        )
        if len(fields) - ("__metadata__" in fields) > MAX_TENSORS:
            raise ValueError(f"{len(fields)} tensors, at most {MAX_TENSORS} are allowed")
        if fields.get("__metadata__") is not None:  # mlx writes null.
            _check_metadata(fields["__metadata__"])
        tensors = {
            name: _parse_tensor(name, f, 8 + length)
            for name, f in fields.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            raise ValueError(f"tensor {name} does not follow the previous one")
        end = info.end
    if end != size:
        raise ValueError(f"the header declares {end} bytes, and the file has {size}")
    return MappingProxyType(tensors)


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a mapping from the pairs of a JSON object; reject duplicate keys."""
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return names


def _reject_constant(text: str) -> object:
    """Reject NaN and Infinity, which are not JSON."""
    raise ValueError(f"{text} is not JSON")


def _check_metadata(metadata: dict[str, str]) -> None:
    """Reject metadata that are not texts by key, with ValueError or the error of a wrong type."""
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {short(key)} is not text")
        f"{key}{value}".encode()  # Half a surrogate pair raises UnicodeEncodeError, a ValueError.


def _parse_tensor(name: str, fields: dict[str, Any], offset: int) -> TensorInfo:
    """Parse the declaration of one tensor."""
    if not NAME.fullmatch(name):
        raise ValueError(f"invalid tensor name {short(name)}")
    if set(fields) != {"dtype", "shape", "data_offsets"} or not isinstance(fields["shape"], list):
        raise ValueError(f"tensor {name} is {short(fields)}")
    dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in SIZES:
        raise ValueError(f"tensor {name} has the dtype {short(dtype)}")
    for number in (begin, end):
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise ValueError(f"tensor {name} has the shape {short(shape)} at {short((begin, end))}")
    check_shape(name, shape)
    if end - begin != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"tensor {name} has {end - begin} bytes for {dtype} {short(shape)}")
    return TensorInfo(dtype, tuple(shape), offset + begin, offset + end)


def check_shape(name: str, shape: Sequence[Any]) -> None:
    """Check a shape that a file states, before anything is computed with it.

    Args:
        name: The name of the tensor, for the error.
        shape: The shape.

    Raises:
        ValueError: There are more than `MAX_SIDES` sides, a side is not an integer of at least 0,
            or the product of the sides overflows.
    """
    sides = shape if len(shape) <= MAX_SIDES else ()
    wrong = len(shape) > MAX_SIDES or any(type(n) is not int or not 0 <= n < 1 << 62 for n in sides)
    if wrong or math.prod(side or 1 for side in sides) >= 1 << 62:
        raise ValueError(f"tensor {name} has the shape {short(shape)}, which is not possible")


def check_finite(path: Path, tensors: Header) -> None:
    """Check that every number in a file is finite, and stays so in float32, in which experts are used.

    Args:
        path: The path of the safetensors file.
        tensors: The header of the file.

    Raises:
        IntegrityError: A tensor holds NaN, infinity or a larger number than float32 can hold, or
            the file is cut. The message names the first such tensor.
    """
    import numpy

    with path.open("rb") as file:  # It is not mapped: a map of a file that is cut ends the process.
        for name, info in tensors.items():
            if info.dtype not in TOO_LARGE:
                continue
            (kind, first), size, width = TOO_LARGE[info.dtype], 0, SIZES[info.dtype]
            for chunk in read_chunks(file, info.begin, info.bytes):
                size += len(chunk)
                bits = numpy.frombuffer(chunk, dtype=kind, count=len(chunk) // width)
                if bool(((bits & ((1 << 8 * width - 1) - 1)) >= first).any()):
                    large = ", or numbers that float32 cannot hold" if width == 8 else ""
                    raise IntegrityError(
                        f"{path}: tensor {name} holds NaN or infinity{large}",
                        "train or export the expert again: such weights break every composition",
                    )
            if size != info.bytes:
                raise IntegrityError(f"{path} is damaged: tensor {name} is cut", HINT)


def hash_tensors(files: Iterable[Path]) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Hash every tensor of safetensors files, several at a time.

    Args:
        files: The paths of the files.

    Returns:
        The name, the dtype, the shape and the sha256 of the bytes of each tensor.

    Raises:
        IntegrityError: A file is malformed.
    """
    places = [(file, name, info) for file in files for name, info in read_header(file).items()]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda place: _hash_tensor(place[0], place[2]), places)
        return [
            (name, info.dtype, info.shape, digest)
            for (_, name, info), digest in zip(places, digests, strict=True)
        ]


def _hash_tensor(path: Path, info: TensorInfo) -> str:
    """Hash the bytes of one tensor."""
    digest, left = hashlib.sha256(), info.bytes
    buffer = memoryview(bytearray(min(left, CHUNK)))
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin)
        while left and (count := file.readinto(buffer[: min(left, CHUNK)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
