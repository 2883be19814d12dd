"""Tensors of many parts in one memory-mapped file: a part is read in microseconds.

A folder holds `tensors.bin`, `index.json` and a manifest. The index has the settings of each part
and the places of its tensors. `hub verify` finds damage by the manifest. The format is for caches;
experts are exchanged as safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from experthub.hub.files import checksummed_text
from experthub.hub.files.atomic import open_atomically, write_json
from experthub.hub.files.digests import sha256_of
from experthub.hub.formats.safetensors_reader import DTYPES
from torch import Tensor

DATA, INDEX = "tensors.bin", "index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNED = 64  # Every tensor starts at a multiple of this number of bytes.


class TensorsWriter:
    """A writer of a folder of mapped tensors. The files appear when the block ends without an error.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.end, self.sha256 = folder, 0, hashlib.sha256()
        self.parts: list[dict[str, Any]] = []

    def __enter__(self) -> TensorsWriter:
        self.stack = ExitStack()
        self.file: IO[bytes] = self.stack.enter_context(open_atomically(self.folder / DATA))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
        if error[0] is None:
            write_json(self.folder / INDEX, {"parts": self.parts})
            files = {DATA: self.sha256.hexdigest(), INDEX: sha256_of(self.folder / INDEX)}
            checksummed_text.write_manifest(self.folder, files)

    def put(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a part.

        Args:
            settings: Plain values.
            tensors: The tensors by name.
        """
        places: dict[str, Any] = {}
        for name, tensor in tensors.items():
            self._write(b"\0" * (-self.end % ALIGNED))
            places[name] = [NAMES[tensor.dtype], list(tensor.shape), self.end]
            data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._write(memoryview(data))
        self.parts.append({"settings": dict(settings), "tensors": places})

    def _write(self, data: bytes | memoryview) -> None:
        """Append bytes to the file."""
        self.file.write(data)
        self.sha256.update(data)
        self.end += len(data)


class MappedTensors:
    """The parts of a folder of mapped tensors, read by number. They stay readable if the folder is removed.

    Opening or reading a damaged folder raises LookupError, TypeError, ValueError, AttributeError,
    RuntimeError or OSError.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / DATA
        self.parts = json.loads((folder / INDEX).read_bytes())["parts"]
        # A private mapping: writing to a tensor never changes the file.
        self.data: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings and the tensors of a part."""
        part = self.parts[number]
        places = part["tensors"].items()
        return part["settings"], {name: self._tensor(*place) for name, place in places}

    def _tensor(self, dtype: str, shape: list[int], start: int) -> Tensor:
        """Return a tensor as a view of the file."""
        kind = DTYPES[dtype]
        if start % ALIGNED or start + math.prod(shape) * kind.itemsize > self.data.nbytes():
            raise ValueError(f"a tensor at byte {start} lies outside of the file")
        empty: Any = torch.empty(0, dtype=kind)
        tensor: Tensor = empty.set_(self.data, start // kind.itemsize, shape)
        return tensor
