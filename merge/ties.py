"""TIES: trim each task vector, elect a sign for every entry, and merge what agrees with it.

Yadav et al., https://arxiv.org/abs/2306.01708, section 3.  Weights multiply before the election,
which the paper, without weights, leaves open.
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

CHUNK = 1 << 18  # entries of a tensor that are looked at at once
# Shift and width of the digits of a magnitude's bits, the sign left out, the highest first.
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
    """Trimmed task vectors, merged where they agree with the elected sign `sgn(sum_e w_e tau_e)`.

    The merged entry is `scale * sum w_e tau_e / sum |w_e|` over the experts that agree; where the
    weighted entries cancel exactly, nothing changes.

    density: share of the entries of a task vector that are kept, those of largest magnitude, at
    least one; equal magnitudes at the limit are all kept.  scale: factor of the whole change.
    trim_scope: the share is of the whole task vector, as in the paper, or of each tensor alone.
    normalize: false leaves out the division, for the sum of what agrees.
    """
    base = check_weights(vectors, weights)
    kept = keep_agreeing(trim(vectors, density, trim_scope), weights)
    at = partial(_mean, list(zip(kept, weights.tolist(), strict=True)), scale, normalize)
    return unite_vectors(base, vectors, at)


def _mean(
    pairs: Sequence[tuple[TaskVector, float]], scale: float, normalize: bool, name: str
) -> Delta:
    """`scale * sum w d / sum |w|` over the entries that are not zero, in float32 at least."""
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
        for total_part, share_part, part in _parts(total, share, d):
            total_part.add_(part, alpha=weight)
            if normalize:
                # |w|, not w as in mergekit: there a negative weight cancels out of the mean.
                share_part.add_(part != 0, alpha=abs(weight))
        del d, part  # before the next is made
    if normalize:
        for total_part, share_part in _parts(total, share):
            total_part.div_(share_part.masked_fill_(share_part == 0, 1))
    return Dense(total.mul_(scale).to(dtype))


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of the same entries of contiguous tensors: temporaries of them stay in the cache."""
    return zip(*(torch.split(tensor.view(-1), CHUNK) for tensor in tensors), strict=True)


def _owned(delta: Delta) -> Tensor:
    """The change as a contiguous tensor that nobody else holds."""
    d = delta.dense()
    return (
        d.contiguous()
        if isinstance(delta, LowRank)
        else d.clone(memory_format=torch.contiguous_format)
    )


def trim(
    vectors: Sequence[TaskVector], density: float, trim_scope: Literal["model", "tensor"] = "model"
) -> list[TaskVector]:
    """Each vector with all but its entries of largest magnitude set to zero, lazily.

    density, trim_scope: as for `ties`.  The first tensor that is asked for reads all of its scope,
    one tensor at a time.
    """
    if density >= 1:
        return list(vectors)
    return [_trimmed(vector, density, trim_scope) for vector in vectors]


def _trimmed(vector: TaskVector, density: float, trim_scope: str) -> TaskVector:
    @cache
    def limit(names: tuple[str, ...]) -> float:
        return find_threshold(lambda: (vector[name].dense() for name in names), density)

    def at(name: str) -> Delta:
        least = limit(tuple(vector) if trim_scope == "model" else (name,))
        d = _owned(vector[name])
        for (part,) in _parts(d):
            part.masked_fill_(part.abs() < least, 0)
        return Dense(d)

    return TaskVector(vector.base, {name: partial(at, name) for name in vector}, vector.seed)


def find_threshold(
    tensors: Callable[[], Iterable[Tensor]], density: float, dtype: torch.dtype = torch.float32
) -> float:
    """The magnitude that the `max(1, int(density * n))` largest of n entries have at least.

    tensors: gives the entries anew each time; one tensor is in memory at a time.  A radix select:
    the bits of a positive float, read as an integer, are in the order of the floats.
    """
    prefix, rank = 0, 0
    for shift, width in DIGITS[dtype]:
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for tensor in tensors():
            if tensor.dtype == torch.float64 != dtype:
                return find_threshold(tensors, density, torch.float64)
            for part in torch.split(tensor.flatten(), CHUNK):
                digits = part.abs().to(dtype).view(BITS[dtype]) >> shift
                if rank:
                    digits = digits[digits >> width == prefix]
                digits = digits & ((1 << width) - 1)
                counts += torch.bincount(digits, minlength=1 << width).cpu()
            del tensor, part  # before the next is made
        rank = rank or max(1, int(density * int(counts.sum())))
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < rank).sum())
        rank -= int(from_top[place - 1]) if place else 0
        prefix = prefix << width | len(counts) - 1 - place
    return float(torch.tensor(prefix, dtype=BITS[dtype]).view(dtype))


def keep_agreeing(vectors: Sequence[TaskVector], weights: Tensor | None = None) -> list[TaskVector]:
    """Each vector with zero in place of the entries that disagree with their elected sign, lazily.

    The elected sign is that of the sum, weighted by `weights` `[E]` if they are given.  Asked for a
    name, the vectors elect once, if no other name is asked for in between.
    """
    weights = torch.ones(len(vectors)) if weights is None else weights
    check_weights(vectors, weights)
    pairs = list(zip(vectors, weights.tolist(), strict=True))
    elected = lru_cache(maxsize=1)(partial(_elected, pairs))

    def at(vector: TaskVector, weight: float, name: str) -> Delta:
        signs, own = elected(name), (weight > 0) - (weight < 0)
        d = _owned(vector[name])
        for part, sign in _parts(d, signs):
            part.masked_fill_(part * (sign * own) <= 0, 0)
        return Dense(d)

    return [
        TaskVector(v.base, {name: partial(at, v, w, name) for name in v}, v.seed) for v, w in pairs
    ]


def _elected(pairs: Sequence[tuple[TaskVector, float]], name: str) -> Tensor:
    """The sign of the weighted sum of all changes under a name, as int8.

    It is 0 where the sum is, as in the paper, so that nothing agrees; mergekit takes plus there.
    """
    total = None
    for vector, weight in pairs:
        if name not in vector.load:
            continue
        d = vector[name].dense().contiguous()
        if total is None:
            # In float64: the order of the experts should not decide what cancels.
            total = torch.zeros(d.shape, dtype=torch.float64, device=d.device)
        if d.shape != total.shape:
            raise ValueError(f"expected deltas of one shape, found {[*total.shape], [*d.shape]}")
        for total_part, part in _parts(total, d):
            total_part.add_(part, alpha=weight)
        del d, part  # before the next is made
    if total is None:
        raise KeyError(name)
    return total.sign_().to(torch.int8)
