"""Exact inner products of weight changes; low-rank changes are never made dense.

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
    """Compute the Frobenius inner product `<x, y>` of two changes of one weight.

    Low-rank changes use `<B1 A1, B2 A2> = trace((B2^T B1) (A1 A2^T))`, which takes
    `O((O + I) R^2)`.

    Args:
        x: A change of a weight.
        y: Another change of the same shape.

    Returns:
        The inner product, computed in double precision.

    Raises:
        ValueError: The shapes differ.
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
        return float(((b_Or.mT @ y.b.double()) * (a_rI @ y.a.double().mT)).sum() * y.scale)
    return float(((b_Or.mT @ y.d.double()) * a_rI).sum())


def gram_matrix(vectors: Sequence[TaskVector]) -> Tensor:
    """Compute the inner products of all pairs of task vectors.

    An inner product is the sum of `inner_product` over the parameters. A parameter that a vector
    lacks counts as a zero change.

    Args:
        vectors: E task vectors of one base.

    Returns:
        The symmetric Gram matrix `[E, E]`, in double precision.

    Raises:
        ValueError: The task vectors have different bases.
    """
    find_base(vectors)
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.double)
    for name in dict.fromkeys(name for vector in vectors for name in vector):
        _add(found, {e: v[name] for e, v in enumerate(vectors) if name in v.load})
    return (found + found.T) / 2


def cosine_matrix(gram_EE: Tensor) -> Tensor:
    """Compute cosine similarities from inner products.

    Args:
        gram_EE: A Gram matrix `[E, E]`, as from `gram_matrix`.

    Returns:
        The cosines `[E, E]`, between -1 and 1. The diagonal is 1; other cosines with a zero vector
        are 0.
    """
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt()
    found = gram_EE / (norm_E[:, None] * norm_E)
    return found.nan_to_num(0, 0, 0).clamp(-1, 1).fill_diagonal_(1)


def _add(found: Tensor, deltas: Mapping[int, Delta]) -> None:
    """Add the inner products of the changes of one parameter, keyed by their vectors' positions."""
    low = [delta for delta in deltas.values() if isinstance(delta, LowRank)]
    if len(low) == len(deltas):
        places = torch.tensor(list(deltas))
        found[places[:, None], places] += _multiply_low_rank(low)
        return
    for e, f in product(deltas, repeat=2):
        found[e, f] += inner_product(deltas[e], deltas[f])


def _multiply_low_rank(deltas: Sequence[LowRank]) -> Tensor:
    """Compute the inner products of low-rank changes from two products of the stacked factors."""
    a_RI = torch.cat([delta.a for delta in deltas], -2).double()
    b_OR = torch.cat([delta.b.double() * delta.scale for delta in deltas], -1)
    ranks = torch.tensor([delta.rank for delta in deltas])
    of_RE = torch.nn.functional.one_hot(torch.arange(len(ranks)).repeat_interleave(ranks)).double()
    products_RR = (b_OR.mT @ b_OR) * (a_RI @ a_RI.mT)
    return of_RE.T @ products_RR.view(-1, *products_RR.shape[-2:]).sum(0) @ of_RE
