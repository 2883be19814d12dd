"""Writing a difference as a task vector, dense or sparse, one tensor at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import write_json
from experthub.hub.finetunes.form import Error, Form
from experthub.hub.finetunes.two_models import Changed, StoredWeights, read_pair
from experthub.hub.formats.safetensors_writer import SafetensorsLayout, safetensors_file
from experthub.hub.formats.task_vector import SHAPES, unpack_mask
from experthub.hub.kinds.task_vector import SHARD, SHARD_INDEX, TASK_VECTOR
from experthub.hub.progress import Report
from torch import Tensor

if TYPE_CHECKING:
    from experthub.hub.formats.safetensors_writer import Writer

DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}


def write(
    folder: Path,
    base: Base,
    untouched: StoredWeights,
    tuned: StoredWeights,
    changed: list[Changed],
    form: Form,
    report: Report,
) -> Error:
    """Write `task_vector.safetensors`, or several such files and an index of them.

    Returns how far they are from the true difference.
    """
    word, dtype = DTYPES[form.dtype]
    kept = {change.pair.name: _kept(change, form, dtype.itemsize) for change in changed}
    shards = _shards(changed, kept, dtype.itemsize, form.max_shard_size)
    layouts = [_layout(base, shard, kept, word) for shard in shards]
    names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    names = names if len(names) > 1 else [TASK_VECTOR]
    error, done = Error(), 0
    for file, layout, shard in zip(names, layouts, shards, strict=True):
        with safetensors_file(folder / file, layout) as writer:
            for change in shard:
                name = change.pair.name
                read = read_pair(change.pair, untouched, tuned)
                stored = _put(writer, name, read.delta, kept[name], dtype)
                if not bool(torch.isfinite(stored).all()):
                    raise HubError(
                        f"the change of {name} overflows {form.dtype}", "use bfloat16 or float32"
                    )
                error.add(name, read, stored)
                done += 1
                report("writing the difference", done, len(changed))
    if len(names) > 1:
        places = {
            n: file for file, layout in zip(names, layouts, strict=True) for n in layout.places
        }
        size = sum(layout.bytes for layout in layouts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / SHARD_INDEX, index)
    return error


def _shards(
    changed: list[Changed], kept: dict[str, int | None], width: int, limit: int
) -> list[list[Changed]]:
    """The parameters in their order, as many in each file as its limit of bytes allows."""
    shards: list[list[Changed]] = [[]]
    size = 0
    for change in changed:
        count = kept[change.pair.name]
        more = change.count * width if count is None else -(-change.count // 8) + count * width
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(change)
        size += more
    return shards


def _kept(change: Changed, form: Form, width: int) -> int | None:
    """How many entries of a parameter are stored beside a mask; None for a dense one."""
    if form.sparse is None:
        return None
    kept = min(change.entries, math.ceil(form.sparse * change.count))
    return kept if kept and -(-change.count // 8) + kept * width < change.count * width else None


def _layout(
    base: Base, changed: list[Changed], kept: dict[str, int | None], dtype: str
) -> SafetensorsLayout:
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
    return SafetensorsLayout(tensors, metadata)


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
    return unpack_mask(torch.from_numpy(bits), values, tuple(delta.shape))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
