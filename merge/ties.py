"""TIES: trim each task vector, elect a sign for every entry, and average the entries that agree.

Yadav et al., https://arxiv.org/abs/2306.01708, section 3. The paper has no weights; here they
multiply the task vectors before the election.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, partial
from typing import Annotated, Literal

import torch
from experthub.merge._delta import Delta, Dense, LowRank
from experthub.merge._merges import merges
from experthub.merge._options import Range
from experthub.merge._task_vector import TaskVector, check_weights, unite_vectors
from torch import Tensor

CHUNK_ENTRIES = 1 << 18  # The number of entries that are processed at once.
# The bits of a magnitude, without the sign bit, split into digits: (shift, width), highest first.
DIGITS = {
    torch.float32: ((16, 15), (0, 16)),
    torch.float64: ((48, 15), (32, 16), (16, 16), (0, 16)),
}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@merges.register(paper="https://arxiv.org/abs/2306.01708", whole_model=True, dense=True)
def ties(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    *,
    density: Annotated[float, Range(0.0001, 1)] = 0.2,
    scale: Annotated[float, Range(-10, 10)] = 1.0,
    trim_scope: Literal["model", "tensor"] = "model",
    normalize: bool = True,
) -> TaskVector:
    """Trim task vectors, and average the entries that agree with the sign `sgn(sum_e w_e tau_e)`.

    A merged entry is `scale * sum w_e tau_e / sum |w_e|` over the experts whose weighted entry has
    the elected sign. It is zero where the weighted entries cancel exactly.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.
        density: The share of entries that trimming keeps: those of largest magnitude, and at least
            one. All entries whose magnitude equals the smallest kept one are kept.
        scale: The factor of the merged task vector.
        trim_scope: `model` trims a task vector as a whole, as in the paper; `tensor` trims each
            tensor by itself.
        normalize: Divide sums by `sum |w_e|`.

    Returns:
        The merged task vector, dense.

    Raises:
        ValueError: The bases differ, the number of weights is not the number of vectors, or a
            weight is not finite.
    """
    base = check_weights(vectors, weights)
    kept = keep_agreeing(trim(vectors, density, trim_scope), weights)
    compute_change = partial(
        _average, list(zip(kept, weights.tolist(), strict=True)), scale, normalize
    )
    return unite_vectors(base, vectors, compute_change)


def _average(
    pairs: Sequence[tuple[TaskVector, float]], scale: float, normalize: bool, name: str
) -> Delta:
    """Compute `scale * sum w d / sum |w|` over nonzero entries, in float32 or wider."""
    total, share, dtype = torch.zeros(()), torch.zeros(()), None
    for vector, weight in pairs:
        if name not in vector.load:
            continue
        d = vector[name].dense()
        wide = torch.promote_types(d.dtype, total.dtype)
        if dtype is None:
            total, share = torch.zeros_like(d, dtype=wide), torch.zeros_like(d, dtype=wide)
        dtype = torch.promote_types(d.dtype, dtype or d.dtype)
        total = total.to(wide)
        for total_part, share_part, part in _split_views(total, share, d):
            total_part.add_(part, alpha=weight)
            if normalize:
                # mergekit divides by w instead of |w|, and the sign of a negative weight cancels out.
                share_part.add_(part != 0, alpha=abs(weight))
        del d, part  # Free the memory before the next change is loaded.
    if normalize:
        for total_part, share_part in _split_views(total, share):
            total_part.div_(share_part.masked_fill_(share_part == 0, 1))
    return Dense(total.mul_(scale).to(dtype))


def _split_views(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split contiguous tensors into small views, so that temporary results stay in the CPU cache."""
    return zip(*(torch.split(tensor.view(-1), CHUNK_ENTRIES) for tensor in tensors), strict=True)


def _copy_dense(delta: Delta) -> Tensor:
    """Return a change as a new contiguous tensor, which the caller may modify."""
    d = delta.dense()
    return (
        d.contiguous()
        if isinstance(delta, LowRank)
        else d.clone(memory_format=torch.contiguous_format)
    )


def trim(
    vectors: Sequence[TaskVector], density: float, trim_scope: Literal["model", "tensor"] = "model"
) -> list[TaskVector]:
    """Set all entries but those of largest magnitude to zero, lazily.

    Args:
        vectors: The task vectors.
        density: The share of entries to keep, above 0. At least one entry is kept, and all entries
            are kept from 1 on.
        trim_scope: `model` trims a task vector as a whole: loading its first tensor reads all of
            them, one at a time. `tensor` trims each tensor by itself.

    Returns:
        The trimmed task vectors; dense unless `density` is 1 or more.
    """
    if density >= 1:
        return list(vectors)
    return [_trim_vector(vector, density, trim_scope) for vector in vectors]


def _trim_vector(vector: TaskVector, density: float, trim_scope: str) -> TaskVector:
    """Set the entries of one task vector below a magnitude to zero, lazily."""

    @cache
    def find_limit(names: tuple[str, ...]) -> float:
        return find_threshold(lambda: (vector[name].dense() for name in names), density)

    def compute_change(name: str) -> Delta:
        least = find_limit(tuple(vector) if trim_scope == "model" else (name,))
        d = _copy_dense(vector[name])
        for (part,) in _split_views(d):
            part.masked_fill_(part.abs() < least, 0)
        return Dense(d)

    return TaskVector(
        vector.base, {name: partial(compute_change, name) for name in vector}, vector.seed
    )


def find_threshold(
    tensors: Callable[[], Iterable[Tensor]], density: float, dtype: torch.dtype = torch.float32
) -> float:
    """Find the smallest magnitude among the `max(1, int(density * n))` largest of n entries.

    The search is a radix select: positive floats have the same order as their bits read as
    integers. Only one tensor is in memory at a time.

    Args:
        tensors: Returns an iterable over the tensors; it is called once for each digit.
        density: The share of entries, above 0 and at most 1.
        dtype: The dtype in which magnitudes are compared, float32 or float64. It becomes float64 if
            a tensor is in float64.

    Returns:
        The magnitude.
    """
    prefix, rank = 0, 0
    for shift, width in DIGITS[dtype]:
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for tensor in tensors():
            if tensor.dtype == torch.float64 != dtype:
                return find_threshold(tensors, density, torch.float64)
            for part in torch.split(tensor.flatten(), CHUNK_ENTRIES):
                digits = part.abs().to(dtype).view(BITS[dtype]) >> shift
                if rank:
                    digits = digits[digits >> width == prefix]
                digits = digits & ((1 << width) - 1)
                counts += torch.bincount(digits, minlength=1 << width).cpu()
            del tensor, part  # Free the memory before the next tensor is loaded.
        rank = rank or max(1, int(density * int(counts.sum())))
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < rank).sum())
        rank -= int(from_top[place - 1]) if place else 0
        prefix = prefix << width | len(counts) - 1 - place
    return float(torch.tensor(prefix, dtype=BITS[dtype]).view(dtype))


def keep_agreeing(vectors: Sequence[TaskVector], weights: Tensor | None = None) -> list[TaskVector]:
    """Set the entries that disagree with the elected sign to zero, lazily.

    The elected sign of an entry is the sign of the weighted sum over the experts. It is computed once
    for all vectors if they load the same name one after the other.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`; by default all are 1. An entry agrees if its product
            with the expert's weight has the elected sign.

    Returns:
        The task vectors with zeros, dense.

    Raises:
        ValueError: The bases differ, the number of weights is not the number of vectors, or a
            weight is not finite. Loading a name raises it if the shapes of its changes differ.
    """
    weights = torch.ones(len(vectors)) if weights is None else weights
    check_weights(vectors, weights)
    pairs = list(zip(vectors, weights.tolist(), strict=True))
    elect = lru_cache(maxsize=1)(partial(_elect_signs, pairs))

    def compute_change(vector: TaskVector, weight: float, name: str) -> Delta:
        signs, own = elect(name), (weight > 0) - (weight < 0)
        d = _copy_dense(vector[name])
        for part, sign in _split_views(d, signs):
            part.masked_fill_(part * (sign * own) <= 0, 0)
        return Dense(d)

    return [
        TaskVector(v.base, {name: partial(compute_change, v, w, name) for name in v}, v.seed)
        for v, w in pairs
    ]


def _elect_signs(pairs: Sequence[tuple[TaskVector, float]], name: str) -> Tensor:
    """Compute the sign of the weighted sum of all changes of a parameter, as int8.

    The sign of a zero sum is 0, as in the paper, and no entry agrees with it; mergekit uses plus.
    """
    total = None
    for vector, weight in pairs:
        if name not in vector.load:
            continue
        d = vector[name].dense().contiguous()
        if total is None:
            # Rounding to float32 would let the order of the experts decide which sums are zero.
            total = torch.zeros(d.shape, dtype=torch.float64, device=d.device)
        if d.shape != total.shape:
            raise ValueError(f"expected deltas of one shape, found {[*total.shape], [*d.shape]}")
        for total_part, part in _split_views(total, d):
            total_part.add_(part, alpha=weight)
        del d, part  # Free the memory before the next change is loaded.
    if total is None:
        raise KeyError(name)
    return total.sign_().to(torch.int8)
