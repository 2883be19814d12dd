"""The kind of task vectors: changes of whole parameters, in one safetensors file or several."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.bases.names import Piece, Shape, join_pieces
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
from experthub.hub.kinds.kind import Changes, ExpertKind, kinds
from experthub.hub.kinds.stored_expert import StoredExpert

if TYPE_CHECKING:
    from experthub.merge import Delta
    from torch import Tensor

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
    sources: dict[str, list[tuple[StoredChange, Piece | None]]] = {}
    for name, one in stored.items():
        place = base.names.locate(name) or ()
        for piece in [None] if isinstance(place, str) else place:
            parameter = place if isinstance(place, str) else piece and piece.parameter
            sources.setdefault(str(parameter), []).append((one, piece))

    def read(one: StoredChange) -> Tensor:
        file = files[one.file]
        values: Tensor = file.get_tensor(one.values).float()
        if one.mask is None:
            return values
        return unpack_mask(file.get_tensor(one.mask), values, one.shape)

    def change(own: list[tuple[StoredChange, Piece | None]], shape: Shape) -> Delta:
        return Dense(join_pieces(((read(one), piece) for one, piece in own), shape))

    # A tied weight is stored once, for all parameters that share it.
    tied = {use: sources[n] for use, n in base.tied.items() if use not in sources and n in sources}
    shapes = footprint.shapes
    return {name: partial(change, own, shapes[name]) for name, own in (sources | tied).items()}


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
