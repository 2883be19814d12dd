"""The dense parts of low-rank experts: their checks against a base, and their changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from experthub.hub.errors import HubError
from experthub.hub.formats.adapter import ADAPTER
from experthub.hub.formats.dense_parts import HEADS, DensePart, group_parts
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.formats.safetensors_reader import read_tensor
from experthub.merge import Dense

if TYPE_CHECKING:
    from experthub.hub.formats.safetensors_reader import Tensors
    from experthub.hub.kinds.footprint import BaseShapes
    from experthub.hub.kinds.kind import Changes
    from experthub.hub.kinds.stored_expert import StoredExpert
    from torch import Tensor

Parts = dict[str, tuple[DensePart, ...]]


def check_dense_parts(
    expert: StoredExpert, parts: Sequence[DensePart]
) -> tuple[Parts, tuple[str, ...]]:
    """Check dense parts against the base, and separate those that only repeat its weights.

    Args:
        expert: The stored expert.
        parts: The parts of its adapter.

    Returns:
        The parts by parameter, with the checksums of their content, and the names of the tensors
        that are copies of the base's weights.

    Raises:
        HubError: The base lacks a parameter, or it has another shape.
    """
    path, tied = expert.locate(ADAPTER), expert.base.tied
    header = read_header(path)
    used: list[DensePart] = []
    copies: list[DensePart] = []
    for given in parts:
        part = _place(expert, given)
        _check_shape(expert, part)
        value = read_tensor(path, header[part.tensor])
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        read = replace(part, digest=hashlib.sha256(content).hexdigest())
        (copies if _is_copy(part, value, expert.base) else used).append(read)
    # A copy counts if another part changes the weight that it is tied to, for all of its uses.
    shared = {p.parameter for p in used if p.way in ("copy", "rows")}
    pairs = {*tied.items(), *((stored, use) for use, stored in tied.items())}
    kept = {one for one, other in pairs if other in shared}
    used += [part for part in copies if part.parameter in kept]
    found = group_parts(used)
    for name, other in pairs:
        if name in shared:
            found.setdefault(other, found[name])
    return found, tuple(p.tensor for p in copies if p.parameter not in kept)


def _place(expert: StoredExpert, part: DensePart) -> DensePart:
    """Return a part under the name of the base's parameter."""
    place = expert.base.names.locate(part.parameter)
    if place is not None and not isinstance(place, str):
        raise HubError(
            f"{expert.name} has a {part.parameter}, which is a piece of {place[0].parameter} in "
            f"{expert.base.name}",
            "merge the adapter with peft, and store the difference with hub diff",
        )
    return part if place is None else replace(part, parameter=place)


def _check_shape(expert: StoredExpert, part: DensePart) -> None:
    """Refuse a part that does not fit its parameter in the base."""
    own = expert.base.shapes.get(part.parameter)
    shape = count_rows((part,), own) if own else part.shape
    if own == shape or (own and expert.fits_vocabulary(part.parameter, shape)):
        return
    what = f"row {max(part.rows)}" if part.way == "rows" else f"{list(part.shape)}"
    raise HubError(
        f"{expert.name} has a {part.parameter} {what}, but {expert.base.name} has "
        + ("no such parameter" if own is None else f"{list(own)}"),
        _suggest(part.parameter, own),
    )


def count_rows(parts: Sequence[DensePart], own: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that dense parts give to a parameter.

    Args:
        parts: The dense parts of the parameter.
        own: The shape in the base.

    Returns:
        The shape, with as many rows as the parts need.
    """
    whole = next((part.shape for part in reversed(parts) if part.way != "rows"), None)
    rows = [1 + max(part.rows) for part in parts if part.way == "rows" and part.rows]
    rest = next((part.shape[1:] for part in parts), own[1:])
    first = whole[0] if whole else own[0]
    return (max([first, *rows]), *rest) if own else ()


def _suggest(parameter: str, own: tuple[int, ...] | None) -> str:
    """Write the hint for a dense part that does not fit."""
    head = any(parameter.startswith(f"{name}.") for names in HEADS.values() for name in names)
    if own is None and parameter.endswith(".bias") and not head:
        return "use the base that the expert was trained on; a new bias cannot be added to a module"
    return (
        "use the base that the expert was trained on, saved in the class of its task: for a "
        "classifier AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=N)"
        ".save_pretrained(FOLDER)"
    )


def _is_copy(part: DensePart, value: Tensor, base: BaseShapes) -> bool:
    """Tell whether a part repeats the base's weight, exactly or rounded to a narrower dtype."""
    if part.way == "add" or part.parameter in base.lacks:
        return False
    own = base.read_weight(part.parameter)
    if part.way == "rows":
        own = own[list(part.rows)] if max(part.rows, default=-1) < len(own) else own[:0]
    own = own[: len(value)]
    return (own.shape == value.shape and torch.equal(own.to(value.dtype), value)) or torch.equal(
        value.to(own.dtype), own
    )


def fit_rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut the rows of a parameter, or add rows of zeros.

    Args:
        value: The parameter.
        shape: The shape of the result.

    Returns:
        The parameter itself if it has that shape, or else a new tensor.
    """
    if tuple(value.shape) == shape:
        return value
    found = value.new_zeros(shape)
    count = min(len(value), shape[0])
    found[:count] = value[:count]
    return found


def load_dense_changes(
    tensors: Tensors, parts: Mapping[str, tuple[DensePart, ...]], base: BaseShapes
) -> Changes:
    """Return for each parameter with dense parts a function that makes its change in float32.

    Args:
        tensors: The tensors of the adapter.
        parts: The dense parts by parameter.
        base: The base.

    Returns:
        Parameter -> function that returns `saved - base`, where rows that the base lacks count as
        zeros. A parameter that the base lacks does not
        change: it is given to the model before.
    """

    def change(parameter: str) -> Dense:
        own = base.read_weight(parameter).float()
        before = fit_rows(own, count_rows(parts[parameter], tuple(own.shape)))
        after, more = before.clone(), torch.zeros(())
        for part in parts[parameter]:
            value = tensors[part.tensor].float()
            if part.way == "rows":
                after[list(part.rows)] = value
            elif part.way == "add":
                more = more + value * part.scale
            else:
                after = fit_rows(value, tuple(before.shape)).clone()
        return Dense(after - before + more)

    return {name: partial(change, name) for name in parts if name not in base.lacks}
