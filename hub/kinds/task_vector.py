"""Task vectors: the changes of whole parameters, in one safetensors file or in several."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.formats.task_vector import (
    HINT,
    StoredChange,
    check_masks,
    read_task_vector,
    unpack_mask,
)
from experthub.hub.kinds.kind import BaseShapes, Changes, ExpertKind, Footprint, StoredExpert, kinds

if TYPE_CHECKING:
    from experthub.merge import Delta

TASK_VECTOR = "task_vector.safetensors"
SHARD = "task_vector-{:05d}-of-{:05d}.safetensors"
SHARD_INDEX = "task_vector.safetensors.index.json"
NUMBER = "[0-9]" * 5
SHARDS = f"task_vector-{NUMBER}-of-{NUMBER}.safetensors"


def find_files(folder: Path) -> dict[str, Path]:
    """Find the safetensors files of the task vector in a folder.

    Args:
        folder: A folder with one file, or with an index and several files.

    Returns:
        File name -> path.

    Raises:
        IntegrityError: The index is not exactly that of files `task_vector-00001-of-0000N`.
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


def _wrong(path: Path, fact: str) -> IntegrityError:
    """Return the error for a malformed index."""
    return IntegrityError(f"{path}: {fact}", HINT)


def _check(folder: Path) -> list[str]:
    """Check a task vector's files, and return their names."""
    files = find_files(folder)
    read_task_vector(files)
    for path in files.values():
        check_masks(path)
    return [*files, *([SHARD_INDEX] if TASK_VECTOR not in files else [])]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read which parameters a task vector changes."""
    names = sorted(name for name in expert.files if name.endswith(".safetensors"))
    stored = read_task_vector({name: expert.locate(name) for name in names})
    return Footprint(expert.check_dense({name: one.shape for name, one in stored.items()}))


def _load(contents: Mapping[str, Any], footprint: Footprint, base: BaseShapes) -> Changes:
    """Return a function for each changed parameter that reads its change, in float32."""
    from experthub.merge import Dense
    from safetensors import safe_open

    stored = read_task_vector(contents)
    files: dict[str, Any] = {n: safe_open(p, framework="pt") for n, p in contents.items()}

    def change(one: StoredChange) -> Delta:
        file = files[one.file]
        values = file.get_tensor(one.values).float()
        if one.mask is None:
            return Dense(values)
        return Dense(unpack_mask(file.get_tensor(one.mask), values, one.shape))

    # A tied weight is stored once, for all of its uses.
    tied = {use: stored[n] for use, n in base.tied.items() if use not in stored and n in stored}
    return {name: partial(change, one) for name, one in (stored | tied).items()}


kinds.register(
    ExpertKind(
        name="task_vector",
        label="a task vector",
        marks=(TASK_VECTOR, SHARD_INDEX),
        files=(TASK_VECTOR, SHARDS, SHARD_INDEX),
        check=_check,
        footprint=_footprint,
        load=_load,
        opened=(TASK_VECTOR, SHARDS),
    )
)
