"""Reading tensors from the bytes of a safetensors file."""

from __future__ import annotations

import math
from mmap import mmap
from pathlib import Path

import torch
from experthub.hub.errors import IntegrityError
from experthub.hub.files.digests import read_chunks
from experthub.hub.formats.safetensors_header import HINT, TensorInfo, parse_header
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Read one tensor of a file that belongs to somebody else.

    The file is not mapped: if a mapped file is cut, reading it ends the process.

    Args:
        path: The path of the safetensors file.
        info: The declaration of the tensor in its header.

    Returns:
        The tensor.

    Raises:
        IntegrityError: The file is shorter than its header says.
    """
    data = bytearray()
    with path.open("rb") as file:
        for chunk in read_chunks(file, info.begin, info.bytes):
            data += chunk
    if len(data) != info.bytes:
        raise IntegrityError(f"{path} was cut while it was read", HINT)
    if not data:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)


class Tensors:
    """The float tensors of one safetensors file. Each is a view of the file's bytes.

    Args:
        data: The whole file, mapped into memory.

    Raises:
        ValueError: The header is malformed.
    """

    def __init__(self, data: mmap) -> None:
        self.data = data
        self.header = parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")], len(data))

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by name."""
        info = self.header[name]
        dtype, count = DTYPES[info.dtype], math.prod(info.shape)
        flat = torch.frombuffer(self.data, dtype=dtype, count=count, offset=info.begin)
        return flat.view(info.shape)
