"""Inner products of weight changes, exact and without their dense form where they are low-rank.

Shapes: E task vectors, R the sum of their ranks at one parameter, O rows and I columns of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from experthub.merge._delta import Delta, Dense, LowRank
from experthub.merge._task_vector import TaskVector, find_base
from torch import Tensor


def inner_product(x: Delta, y: Delta) -> float:
    """The Frobenius inner product `<x, y>` of two changes of one weight, in double precision.

    Of low-rank ones `<B1 A1, B2 A2> = trace((B2^T B1) (A1 A2^T))`, `O((O + I) R^2)`.  Raises
    ValueError for unequal shapes.
    """
    if x.shape != y.shape:
        raise ValueError(f"expected changes of one shape, found {list(x.shape)}, {list(y.shape)}")
    if isinstance(x, Dense):
        return (
            float((x.d.double() * y.d.double()).sum())
            if isinstance(y, Dense)
            else inner_product(y, x)
        )
    a_rI, b_Or = x.a.double(), x.b.double() * x.scale
    if isinstance(y, LowRank):
        return float(((b_Or.T @ y.b.double()) * (a_rI @ y.a.double().T)).sum() * y.scale)
    return float(((b_Or.T @ y.d.double()) * a_rI).sum())


def gram_matrix(vectors: Sequence[TaskVector]) -> Tensor:
    """Inner products `[E, E]` of whole task vectors, in double precision; symmetric.

    The sum over parameters of `inner`; a parameter that a vector lacks is a zero change.  Raises
    ValueError for vectors of different bases.
    """
    find_base(vectors)
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.double)
    for name in dict.fromkeys(name for vector in vectors for name in vector):
        _add(found, {e: v[name] for e, v in enumerate(vectors) if name in v.load})
    return (found + found.T) / 2


def cosine_matrix(gram_EE: Tensor) -> Tensor:
    """Cosines `[E, E]` of what has these inner products; 0 with a zero, but 1 with itself."""
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt()
    found = gram_EE / (norm_E[:, None] * norm_E)
    return found.nan_to_num(0, 0, 0).clamp(-1, 1).fill_diagonal_(1)


def _add(found: Tensor, deltas: Mapping[int, Delta]) -> None:
    """Add the inner products of all changes of one parameter, by the places of their vectors."""
    low = [delta for delta in deltas.values() if isinstance(delta, LowRank)]
    if len(low) == len(deltas):
        places = torch.tensor(list(deltas))
        found[places[:, None], places] += _stacked(low)
        return
    for e, f in product(deltas, repeat=2):
        found[e, f] += inner_product(deltas[e], deltas[f])


def _stacked(deltas: Sequence[LowRank]) -> Tensor:
    """The inner products of low-rank changes, all in two products of their stacked factors."""
    a_RI = torch.cat([delta.a for delta in deltas]).double()
    b_OR = torch.cat([delta.b.double() * delta.scale for delta in deltas], 1)
    ranks = torch.tensor([delta.rank for delta in deltas])
    of_RE = torch.nn.functional.one_hot(torch.arange(len(ranks)).repeat_interleave(ranks)).double()
    return of_RE.T @ ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)) @ of_RE
