"""Writing a difference as a task vector, dense or sparse, one tensor at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from experthub.hub.bases import Base, Report
from experthub.hub.errors import HubError
from experthub.hub.expert import TASK_VECTOR
from experthub.hub.finetunes.form import Error, Form
from experthub.hub.finetunes.two_models import Changed, Weights, read_pair
from experthub.hub.formats.task_vector import SHAPES
from experthub.hub.formats.writer import Layout, safetensors_file
from experthub.hub.weights import unpacked
from torch import Tensor

if TYPE_CHECKING:
    from experthub.hub.formats.writer import Writer

DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}


def write(
    folder: Path,
    base: Base,
    untouched: Weights,
    tuned: Weights,
    changed: list[Changed],
    form: Form,
    report: Report,
) -> Error:
    """Write `task_vector.safetensors`; returns how far it is from the true difference."""
    word, dtype = DTYPES[form.dtype]
    kept = {change.pair.name: _kept(change, form, dtype.itemsize) for change in changed}
    error = Error()
    with safetensors_file(folder / TASK_VECTOR, _layout(base, changed, kept, word)) as writer:
        for i, change in enumerate(changed):
            name = change.pair.name
            read = read_pair(change.pair, untouched, tuned)
            stored = _put(writer, name, read.delta, kept[name], dtype)
            if not bool(torch.isfinite(stored).all()):
                raise HubError(
                    f"the change of {name} overflows {form.dtype}", "use bfloat16 or float32"
                )
            error.add(name, read, stored)
            report("writing the difference", i + 1, len(changed))
    return error


def _kept(change: Changed, form: Form, width: int) -> int | None:
    """How many entries of a parameter are stored beside a mask; None for a dense one."""
    if form.sparse is None:
        return None
    kept = min(change.entries, math.ceil(form.sparse * change.count))
    return kept if kept and -(-change.count // 8) + kept * width < change.count * width else None


def _layout(base: Base, changed: list[Changed], kept: dict[str, int | None], dtype: str) -> Layout:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes: dict[str, list[int]] = {}
    for change in changed:
        name, count = change.pair.name, kept[change.pair.name]
        if count is None:
            tensors[name] = (dtype, change.shape)
        else:
            tensors[f"{name}.values"] = (dtype, (count,))
            tensors[f"{name}.mask"] = ("U8", (-(-change.count // 8),))
            shapes[name] = list(change.shape)
    metadata = {
        "format": "pt",
        "hub.kind": "task_vector",
        "hub.base": base.folder.resolve().name if base.name == str(base.folder) else base.name,
        "hub.base_digest": base.fingerprint,
        "hub.dtype": dtype,
    }
    if base.tied:
        metadata["hub.tied"] = json.dumps(dict(base.tied), sort_keys=True)
    if shapes:
        metadata[SHAPES] = json.dumps(shapes, sort_keys=True)
    return Layout(tensors, metadata)


def _put(writer: Writer, name: str, delta: Tensor, kept: int | None, dtype: torch.dtype) -> Tensor:
    """Write a parameter's change; returns it as a reader will find it."""
    if kept is None:
        stored = delta.to(dtype)
        writer.put(name, _bytes(stored))
        return stored
    import numpy

    flat = delta.flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.abs().topk(kept, sorted=False).indices] = True
    values = flat[mask].to(dtype)
    bits = numpy.packbits(mask.numpy(), bitorder="little")
    writer.put(f"{name}.values", _bytes(values))
    writer.put(f"{name}.mask", bits.data)
    return unpacked(torch.from_numpy(bits), values, tuple(delta.shape))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
