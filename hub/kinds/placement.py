"""The place of an adapter's changes in the parameters of a base, whatever names its file has.

Shapes: N matrices in a stack, O rows, I columns, R the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from experthub.hub.bases.names import ModelNames, Piece, Run, Shape
from experthub.hub.errors import HubError
from experthub.hub.formats.adapter import Adapted

if TYPE_CHECKING:
    from experthub.hub.formats.safetensors_reader import Tensors
    from experthub.merge import Delta, LowRank
    from torch import Tensor

HINT = "use the base that the expert was trained on"


def place_changes(
    adapted: Iterable[Adapted],
    names: ModelNames,
    name: str,
    base_name: str,
    fits_vocabulary: Callable[[str, Shape], bool] = lambda parameter, shape: False,
) -> tuple[Adapted, ...]:
    """Find the parameters that an adapter changes, and check their shapes.

    Args:
        adapted: The changes under the names of the adapter's file.
        names: The names of the base's parameters.
        name: The name of the expert in errors.
        base_name: The name of the base in errors.
        fits_vocabulary: A function that tells whether a parameter has another shape only because the
            adapter has another number of tokens.

    Returns:
        The changes under the names of the base's modules. Several may change one parameter, and a
        change of a module that the base splits becomes several.

    Raises:
        HubError: The base lacks a module, its weight has another shape, or two changes under
            different names are of one module.
    """
    found: list[Adapted] = []
    whole: dict[str, str] = {}
    nests = _order_nests([change for change in adapted if change.targeted], names)
    for change in adapted:
        for own in _place_change(change, names, nests, name, base_name, fits_vocabulary):
            if own.piece is None:
                other = whole.setdefault(own.parameter, change.a)
                if other != change.a:
                    raise HubError(
                        f"{name} changes {own.parameter} of {base_name} twice, as {other} and as "
                        f"{change.a}",
                        "remove one of the two from the file",
                    )
            found.append(own)
    return tuple(found)


def _order_nests(targeted: Sequence[Adapted], names: ModelNames) -> dict[str, list[str]]:
    """Return the targeted parameters of each module, in the order in which PEFT wraps them."""
    if not targeted:
        return {}
    order = {name: place for place, name in enumerate(names.shapes)}
    found: dict[str, list[str]] = {}
    for change in targeted:
        located = [names.locate(f"{change.module}.{t.leaf}") for t in change.targeted]
        here = {place for place in located if isinstance(place, str)}
        found[change.module] = sorted(here, key=order.__getitem__)
    return found


def _place_change(
    change: Adapted,
    names: ModelNames,
    nests: Mapping[str, list[str]],
    name: str,
    base_name: str,
    fits_vocabulary: Callable[[str, Shape], bool],
) -> Iterable[Adapted]:
    """Return the changes of parameters that one change of the file stands for."""
    if nests.get(change.module):
        return [_place_targeted(change, names, nests[change.module], name, base_name)]
    place = names.locate(f"{change.module}.weight")
    if not place:
        raise HubError(f"{name} adapts {change.module}, which {base_name} does not have", HINT)
    if isinstance(place, str):
        module, _, leaf = place.rpartition(".")
        change = _orient(change, names.linear.get(module))
        own = tuple(names.shapes[place])
        if own == change.shape or not fits_vocabulary(place, change.shape):
            _check_shape(change, own, name, base_name)
        # Most adapters have the module's own names, and equal ones share one object.
        return [change if module == change.module else replace(change, module=module, leaf=leaf)]
    _check_shape(change, place[0].shape, name, base_name)
    return [replace(change, module=p.parameter.rpartition(".")[0], piece=p) for p in place]


def _orient(change: Adapted, transposed: bool | None) -> Adapted:
    """Return a change in the orientation of its module, whatever the configuration states.

    A configuration has one `fan_in_fan_out`, and PEFT corrects it for each module.
    """
    if transposed is None or change.embedding or change.transposed == transposed:
        return change
    return replace(change, transposed=transposed, shape=change.shape[::-1])


def _place_targeted(
    change: Adapted, names: ModelNames, nest: Sequence[str], name: str, base_name: str
) -> Adapted:
    """Return the change of a parameter that PEFT adapts without adapting its module."""
    if change.depth >= len(nest):
        raise HubError(
            f"{name} adapts {change.depth + 1} parameters of {change.module}, "
            f"and {base_name} has {len(nest)} of those in its target_parameters",
            HINT,
        )
    module, _, leaf = nest[change.depth].rpartition(".")
    own = next(t for t in change.targeted if t.leaf == leaf)
    shape = names.shapes[nest[change.depth]]
    turned = module in names.transposed and len(shape) == 3
    count, (rows, columns) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    factors = change.rank, *((columns, rows) if turned else (rows, columns))
    if (count * own.rank, *(change.shape)) != factors:
        raise HubError(
            f"{name} changes {module}.{leaf} by factors of rank {change.rank} for "
            f"{list(change.shape)}, but {base_name} has {list(shape)}",
            HINT,
        )
    return replace(
        change,
        module=module,
        leaf=leaf,
        rank=own.rank,
        scale=own.scale,
        shape=tuple(shape),
        transposed=turned,
    )


def _check_shape(change: Adapted, own: Shape, name: str, base_name: str) -> None:
    """Refuse a change of another shape than its place."""
    if own != change.shape:
        raise HubError(
            f"{name} changes {change.module} by {list(change.shape)}, "
            f"but {base_name} has {list(own)}",
            HINT,
        )


def make_delta(changes: Sequence[Adapted], tensors: Tensors, shape: Shape) -> Delta:
    """Make the change of a parameter in float32 from all changes that an adapter has for it.

    Args:
        changes: The changes, as `place_changes` returned them.
        tensors: The tensors of the adapter's file.
        shape: The shape of the parameter.

    Returns:
        The change; dense only if its pieces are neither rows and columns of a matrix nor matrices
        of a stack.
    """
    from experthub.merge import sum_deltas

    if len(shape) == 3 and all(_is_in_stack(change) for change in changes):
        return _stack_pieces(changes, tensors, shape)
    return sum_deltas([_make_one(change, tensors, shape) for change in changes])


def _is_in_stack(change: Adapted) -> bool:
    """Tell whether a change is one of rows and columns of a matrix in a stack."""
    piece = change.piece
    return piece is not None and _is_matrix(piece) and [axis for axis, _ in piece.fixed] == [0]


def _is_matrix(piece: Piece) -> bool:
    """Tell whether a piece consists of rows and columns."""
    return len(piece.axes) == 2 and None not in piece.axes


def _read_factors(change: Adapted, tensors: Tensors) -> LowRank:
    """Read the factors of a change in float32."""
    from experthub.merge import LowRank

    a, b = tensors[change.a].float(), tensors[change.b].float()
    if len(change.shape) == 3:
        count = change.shape[0]
        a = a.view(count, change.rank, -1)
        b = b.view(-1, change.rank, count).permute(2, 0, 1).contiguous()
    found = LowRank(a, b, change.scale)
    # B A is the change of the module. Conv1D, embeddings and some stacks store its transpose.
    return found.transpose() if change.transposed or change.embedding else found


def _make_one(change: Adapted, tensors: Tensors, shape: Shape) -> Delta:
    """Make one change of a parameter."""
    import torch
    from experthub.merge import Dense

    low, piece = _read_factors(change, tensors), change.piece
    if piece is None:
        return low
    if len(shape) == 2 and _is_matrix(piece):
        return _spread(low, piece, shape)
    found = torch.zeros(shape)
    piece.write(low.dense(), found)
    return Dense(found)


def _spread(low: LowRank, piece: Piece, shape: Shape) -> LowRank:
    """Move the rows and columns of a change to their places in a matrix `[O, I]`."""
    from experthub.merge import LowRank

    (first, rows), (second, columns) = (axis for axis in piece.axes if axis is not None)
    b, a = _move_rows(low.b, rows, shape[first]), _move_rows(low.a.T, columns, shape[second])
    return LowRank(a.T.contiguous(), b, low.scale) if first < second else LowRank(b.T, a, low.scale)


def _move_rows(factor: Tensor, runs: Iterable[Run], count: int) -> Tensor:
    """Move the rows of a factor to other places among `count` rows; the other rows are zero."""
    found = factor.new_zeros(count, factor.shape[1])
    for begin, start, length in runs:
        found[start : start + length] = factor[begin : begin + length]
    return found


def _stack_pieces(changes: Sequence[Adapted], tensors: Tensors, shape: Shape) -> LowRank:
    """Stack the changes of single matrices; a matrix without a change has zero factors."""
    import torch
    from experthub.merge import LowRank, sum_deltas

    parts: dict[int, list[Delta]] = {}
    for change in changes:
        if change.piece is not None:
            low = _spread(_read_factors(change, tensors), change.piece, shape)
            at = change.piece.fixed[0][1]
            parts.setdefault(at, []).append(LowRank(low.a, low.b * low.scale))
    sums = {at: sum_deltas(own) for at, own in parts.items()}
    rank = max(one.rank for one in sums.values() if isinstance(one, LowRank))
    a_NRI, b_NOR = torch.zeros(shape[0], rank, shape[2]), torch.zeros(*shape[:2], rank)
    for at, one in sums.items():
        if isinstance(one, LowRank):
            a_NRI[at, : one.rank], b_NOR[at, :, : one.rank] = one.a, one.b
    return LowRank(a_NRI, b_NOR)
