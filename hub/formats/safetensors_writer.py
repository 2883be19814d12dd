"""Writing a safetensors file of any size tensor by tensor: its header first, nothing kept."""

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
    """What a file will hold: tensor name -> dtype and shape, and its metadata.

    Tensors of wide numbers are first, so that each starts at a multiple of its numbers' size:
    torch maps no others.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]

    @property
    def header(self) -> bytes:
        fields: dict[str, object] = {"__metadata__": dict(self.metadata)}
        for name, (begin, end) in self.places.items():
            dtype, shape = self.tensors[name]
            fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Where each tensor's bytes begin and end, after the header."""
        places, end = {}, 0
        for name, (dtype, shape) in sorted(
            self.tensors.items(), key=lambda item: (-SIZES[item[1][0]], item[0])
        ):
            begin, end = end, end + math.prod(shape) * SIZES[dtype]
            places[name] = (begin, end)
        return places

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return max((end for _, end in self.places.values()), default=0)


@dataclass(frozen=True)
class Writer:
    """An open file that takes its tensors' bytes in any order."""

    file: IO[bytes]
    start: int
    places: Mapping[str, tuple[int, int]]

    def put(self, name: str, data: memoryview | bytes) -> None:
        """Write one tensor; ValueError when it has another size than was announced."""
        begin, end = self.places[name]
        if len(data) != end - begin:
            raise ValueError(f"{name} has {len(data)} bytes, {end - begin} were announced")
        self.file.seek(self.start + begin)
        self.file.write(data)


@contextmanager
def create_safetensors(path: Path, layout: SafetensorsLayout) -> Iterator[Writer]:
    """A safetensors file that appears when all its tensors were put into it."""
    header = layout.header
    with open_atomically(path) as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        yield Writer(file, 8 + len(header), layout.places)
