"""Reading tensors from the bytes of a safetensors file."""

from __future__ import annotations

import math
from mmap import mmap

import torch
from experthub.hub.formats.safetensors_header import parse_header
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
}


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
