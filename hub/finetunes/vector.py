"""Write a difference as a dense or sparse task vector, one tensor at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import write_json
from experthub.hub.finetunes.form import ApproximationError, Form, check_kept
from experthub.hub.finetunes.two_models import ChangedParameter, StoredWeights, read_pair
from experthub.hub.formats.safetensors_writer import SafetensorsLayout, create_safetensors
from experthub.hub.formats.task_vector import SHAPES, SHARD, SHARD_INDEX, TASK_VECTOR, unpack_mask
from experthub.hub.progress import Report
from torch import Tensor

if TYPE_CHECKING:
    from experthub.hub.formats.safetensors_writer import Writer

DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}


def write_task_vector(
    folder: Path,
    base: Base,
    untouched: StoredWeights,
    tuned: StoredWeights,
    changed: list[ChangedParameter],
    form: Form,
    report: Report,
) -> ApproximationError:
    """Write `task_vector.safetensors`, or several such files and their index.

    Args:
        folder: The folder to write into.
        base: The base.
        untouched: The base's weights.
        tuned: The fine-tuned weights.
        changed: The parameters that differ.
        form: The form, dense or sparse.
        report: A progress callback.

    Returns:
        The error of the task vector.

    Raises:
        HubError: A change is too large for the dtype.
    """
    word, dtype = DTYPES[form.dtype]
    kept = {change.pair.name: _count_kept(change, form, dtype.itemsize) for change in changed}
    shards = _split_into_shards(changed, kept, dtype.itemsize, form.max_shard_size)
    layouts = [_make_layout(base, shard, kept, word) for shard in shards]
    names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    names = names if len(names) > 1 else [TASK_VECTOR]
    error, done = ApproximationError(), 0
    for file, layout, shard in zip(names, layouts, shards, strict=True):
        with create_safetensors(folder / file, layout) as writer:
            for change in shard:
                name = change.pair.name
                read = read_pair(change.pair, untouched, tuned)
                stored = _write_change(writer, name, read.delta, kept[name], dtype)
                if not bool(torch.isfinite(stored).all()):
                    raise HubError(
                        f"the change of {name} overflows {form.dtype}",
                        "use --dtype bfloat16 or --dtype float32",
                    )
                check_kept(name, read.delta, stored, form)
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


def _split_into_shards(
    changed: list[ChangedParameter], kept: dict[str, int | None], width: int, limit: int
) -> list[list[ChangedParameter]]:
    """Split the parameters in their order into files of at most `limit` bytes."""
    shards: list[list[ChangedParameter]] = [[]]
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


def _count_kept(change: ChangedParameter, form: Form, width: int) -> int | None:
    """Count the entries that are stored beside a mask; None if the parameter is stored dense."""
    if form.sparse is None:
        return None
    kept = min(change.entries, math.ceil(form.sparse * change.count))
    return kept if kept and -(-change.count // 8) + kept * width < change.count * width else None


def _make_layout(
    base: Base, changed: list[ChangedParameter], kept: dict[str, int | None], dtype: str
) -> SafetensorsLayout:
    """Plan the tensors and the metadata of one file."""
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
        "hub.base": base.portable_name,
        "hub.base_digest": base.fingerprint,
        "hub.dtype": dtype,
    }
    if base.tied:
        metadata["hub.tied"] = json.dumps(dict(base.tied), sort_keys=True)
    if shapes:
        metadata[SHAPES] = json.dumps(shapes, sort_keys=True)
    return SafetensorsLayout(tensors, metadata)


def _write_change(
    writer: Writer, name: str, delta: Tensor, kept: int | None, dtype: torch.dtype
) -> Tensor:
    """Write the change of a parameter, and return it as a reader will find it."""
    if kept is None:
        stored = delta.to(dtype)
        writer.put(name, _view_bytes(stored))
        return stored
    import numpy

    flat = delta.flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.abs().topk(kept, sorted=False).indices] = True
    values = flat[mask].to(dtype)
    bits = numpy.packbits(mask.numpy(), bitorder="little")
    writer.put(f"{name}.values", _view_bytes(values))
    writer.put(f"{name}.mask", bits.data)
    return unpack_mask(torch.from_numpy(bits), values, tuple(delta.shape))


def _view_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
