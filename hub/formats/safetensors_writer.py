"""Writing a safetensors file of any size tensor by tensor, with the header first."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from experthub.hub.files.atomic import open_atomically
from experthub.hub.formats.safetensors_header import SIZES


@dataclass(frozen=True)
class SafetensorsLayout:
    """The planned content of a file.

    Tensors with wide numbers come first, so that each tensor starts at a multiple of the size of
    its numbers. torch cannot map other tensors.

    Args:
        tensors: The dtype, such as `F32`, and the shape of each tensor by name.
        metadata: Texts by key.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]

    @property
    def header(self) -> bytes:
        """The header as JSON, padded with spaces to a multiple of 8 bytes."""
        fields: dict[str, object] = {"__metadata__": dict(self.metadata)}
        for name, (begin, end) in self.places.items():
            dtype, shape = self.tensors[name]
            fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """The first byte of each tensor and the byte after its last, counted from the header."""
        places, end = {}, 0
        for name, (dtype, shape) in sorted(
            self.tensors.items(), key=lambda item: (-SIZES[item[1][0]], item[0])
        ):
            begin, end = end, end + math.prod(shape) * SIZES[dtype]
            places[name] = (begin, end)
        return places

    @property
    def bytes(self) -> int:
        """The number of bytes of all tensors."""
        return max((end for _, end in self.places.values()), default=0)


@dataclass(frozen=True)
class Writer:
    """An open file that takes the bytes of its tensors in any order.

    Args:
        file: The file.
        start: The first byte after the header.
        places: The place of each tensor after the header.
    """

    file: IO[bytes]
    start: int
    places: Mapping[str, tuple[int, int]]

    def put(self, name: str, data: memoryview | bytes) -> None:
        """Write one tensor.

        Args:
            name: The name of the tensor.
            data: Its bytes.

        Raises:
            ValueError: The header declares another size.
        """
        begin, end = self.places[name]
        if len(data) != end - begin:
            raise ValueError(f"{name} has {len(data)} bytes, and the header declares {end - begin}")
        self.file.seek(self.start + begin)
        self.file.write(data)


@contextmanager
def create_safetensors(path: Path, layout: SafetensorsLayout) -> Iterator[Writer]:
    """Create a safetensors file that appears after the block, when all its tensors were written.

    Args:
        path: The path of the file.
        layout: The planned content.

    Yields:
        The open file.
    """
    header = layout.header
    with open_atomically(path) as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        yield Writer(file, 8 + len(header), layout.places)
