"""The kind of task vectors: changes of whole parameters, in one safetensors file or several."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.formats.added_tokens import ADDED_TOKENS, SPECIAL_TOKENS, read_added_tokens
from experthub.hub.formats.task_vector import (
    SHARD_INDEX,
    SHARDS,
    TASK_VECTOR,
    StoredChange,
    check_masks,
    find_files,
    read_task_vector,
    unpack_mask,
)
from experthub.hub.kinds.footprint import BaseShapes, Footprint, count_other_rows
from experthub.hub.kinds.kind import Changes, ExpertKind, StoredExpert, kinds

if TYPE_CHECKING:
    from experthub.merge import Delta

COMPANIONS = (ADDED_TOKENS, SPECIAL_TOKENS)


def _check(folder: Path) -> list[str]:
    """Check the files of a task vector; return their names."""
    files = find_files(folder)
    read_task_vector(files)
    for path in files.values():
        check_masks(path)
    own = {n: folder / n for n in COMPANIONS if (folder / n).is_file()}
    own = own if ADDED_TOKENS in own else {}
    read_added_tokens(own, str(folder))
    return [*files, *([SHARD_INDEX] if TASK_VECTOR not in files else []), *own]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read which parameters a task vector changes."""
    names = sorted(name for name in expert.files if name.endswith(".safetensors"))
    stored = read_task_vector({name: expert.locate(name) for name in names})
    shapes = expert.check_dense({name: one.shape for name, one in stored.items()})
    rows = count_other_rows(shapes, expert.base)
    return Footprint(shapes, rows=rows, tokens=expert.read_tokens())


def _load(contents: Mapping[str, Any], footprint: Footprint, base: BaseShapes) -> Changes:
    """Return for each changed parameter a function that reads its change in float32."""
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

    # A tied weight is stored once, for all parameters that share it.
    tied = {use: stored[n] for use, n in base.tied.items() if use not in stored and n in stored}
    return {name: partial(change, one) for name, one in (stored | tied).items()}


kinds.register(
    ExpertKind(
        name="task_vector",
        label="a task vector",
        marks=(TASK_VECTOR, SHARD_INDEX),
        files=(TASK_VECTOR, SHARDS, SHARD_INDEX),
        companions=COMPANIONS,
        check=_check,
        footprint=_footprint,
        load=_load,
        opened=(TASK_VECTOR, SHARDS),
    )
)
