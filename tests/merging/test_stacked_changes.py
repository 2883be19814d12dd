"""Low-rank changes of a stack of matrices, against the same changes of each matrix."""

from __future__ import annotations

import pytest
import torch
from experthub.merge import Delta, Dense, LowRank, inner_product, sum_deltas, truncate
from torch import Tensor


def make(seed: int, rank: int = 2, scale: float = 1.5) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(3, rank, 5, generator=random).double()
    return LowRank(a, torch.randn(3, 4, rank, generator=random).double(), scale)


def dense(change: LowRank) -> Tensor:
    """The product, one matrix after the other."""
    return torch.stack([change.scale * b @ a for a, b in zip(change.a, change.b, strict=True)])


def close(one: Delta, right: Tensor) -> None:
    torch.testing.assert_close(one.dense(), right, rtol=0, atol=1e-12)


def test_a_stack_is_changed_as_each_of_its_matrices() -> None:
    one, other = make(0), make(1, rank=3, scale=0.5)
    assert (one.shape, one.rank) == ((3, 4, 5), 2)
    close(one, dense(one))
    close(one.scaled(2.0), 2 * dense(one))
    close(one.transpose(), dense(one).transpose(1, 2))
    weight = torch.randn(3, 4, 5, dtype=torch.double)
    torch.testing.assert_close(one.add_to(weight), weight + dense(one), rtol=0, atol=1e-12)
    both = sum_deltas([one, other])
    assert isinstance(both, LowRank) and both.rank == 5
    close(both, dense(one) + dense(other))
    product = float((dense(one) * dense(other)).sum())
    assert inner_product(one, other) == pytest.approx(product, abs=1e-12)
    assert inner_product(Dense(dense(one)), other) == pytest.approx(product, abs=1e-12)


def test_each_matrix_of_a_stack_is_truncated() -> None:
    both = sum_deltas([make(0), make(1)])
    found = truncate(both, rank=2)
    assert (found.rank, found.shape) == (2, (3, 4, 5))
    for at in range(3):
        close(truncate(Dense(both.dense()[at]), rank=2), found.dense()[at])
    close(truncate(both, energy=1.0), both.dense())
    close(truncate(Dense(both.dense()), rank=4), both.dense())


def test_stacks_of_two_sizes_are_refused() -> None:
    one = make(0)
    with pytest.raises(ValueError, match="of one rank"):
        LowRank(one.a, one.b[:2])
    with pytest.raises(ValueError, match="of one rank"):
        LowRank(one.a[0], one.b)
