"""The change of one weight: low-rank or dense.

Shapes: O rows and I columns of the weight, R the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change ``scale * b @ a`` of a weight, never formed until asked for.

    a: `[R, I]`.  b: `[O, R]`.  scale: any finite number; LoRA's alpha / r.
    Raises ValueError when ranks, dtypes or devices disagree.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"expected a [R, I] and b [O, R] of one rank, "
                f"found {list(self.a.shape)} and {list(self.b.shape)}"
            )
        if not self.a.is_floating_point() or self.a.dtype != self.b.dtype:
            raise ValueError(f"expected one float dtype, found {self.a.dtype} and {self.b.dtype}")
        if self.a.device != self.b.device:
            raise ValueError(f"expected one device, found {self.a.device} and {self.b.device}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.b.shape[0], self.a.shape[1])

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    def scaled(self, factor: float | Tensor) -> LowRank:
        """This change times a number, kept low-rank; a tensor factor keeps its gradient."""
        if isinstance(factor, Tensor):
            return LowRank(self.a, self.b * (factor * self.scale).to(self.b.dtype))
        return LowRank(self.a, self.b, self.scale * factor)

    def transpose(self) -> LowRank:
        """Return the change of the transposed weight, `[I, O]`."""
        return LowRank(self.b.T.contiguous(), self.a.T.contiguous(), self.scale)

    def dense(self) -> Tensor:
        """The change as a tensor `[O, I]`."""
        return (self.b @ self.a).mul_(self.scale)

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight + scale * b @ a` as a new tensor of the weight's dtype, summed in the wider one."""
        wide = torch.promote_types(weight.dtype, self.dtype)
        a, b = self.a.to(weight.device, wide), self.b.to(weight.device, wide)
        return torch.addmm(weight.to(wide), b, a, alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """The change of a weight as a tensor of the weight's own shape."""

    d: Tensor

    def __post_init__(self) -> None:
        if not self.d.is_floating_point():
            raise ValueError(f"expected a float dtype, found {self.d.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.d.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.d.dtype

    def scaled(self, factor: float | Tensor) -> Dense:
        """This change times a number; a tensor factor keeps its gradient."""
        return Dense(self.d * factor)

    def dense(self) -> Tensor:
        """The change as a tensor."""
        return self.d

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight + d` as a new tensor of the weight's dtype, summed in the wider one."""
        wide = torch.promote_types(weight.dtype, self.dtype)
        return (weight.to(wide) + self.d.to(weight.device, wide)).to(weight.dtype)


Delta = LowRank | Dense


def sum_deltas(deltas: Sequence[Delta]) -> Delta:
    """The exact sum of changes of one weight: low-rank, by concatenation, if all of them are.

    Raises ValueError for an empty sequence or unequal shapes.
    """
    if not deltas:
        raise ValueError("expected at least one delta, found none")
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"expected deltas of one shape, found {sorted(shapes)}")
    if len(deltas) == 1:
        return deltas[0]
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low) == len(deltas):
        a, b = torch.cat([delta.a for delta in low]), torch.cat([delta.b for delta in low], 1)
        if len({delta.scale for delta in low}) == 1:
            return LowRank(a, b, low[0].scale)
        scales = [delta.scale for delta in low for _ in range(delta.rank)]
        return LowRank(a, b * torch.tensor(scales, dtype=b.dtype, device=b.device))
    return Dense(torch.stack([delta.dense() for delta in deltas]).sum(0))


def truncate(delta: Delta, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of a change by one of low rank, in the Frobenius norm.

    Low-rank changes never take their dense form: QR of both factors and an SVD of the
    `[R, R]` core, `O((O + I) R^2)`.  rank: >= 1; a change of lower rank is returned exactly.
    energy: in its place, above 0 and at most 1: the smallest rank whose squared singular values
    hold this share of the sum of all, at least 1.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"expected a rank or an energy, found {rank} and {energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"expected a rank of at least 1, found {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"expected an energy above 0 and at most 1, found {energy}")
    if isinstance(delta, LowRank) and rank is not None and delta.rank <= rank:
        return delta
    u, s, vh = _svd(delta)
    kept = rank if rank is not None else _rank_of(s, energy or 1)
    root = s[:kept].sqrt()
    dtype = delta.dtype
    return LowRank(
        (root[:, None] * vh[:kept]).to(dtype).contiguous(),
        (u[:, :kept] * root).to(dtype).contiguous(),
    )


def _svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of a change, in double precision."""
    if isinstance(delta, LowRank):
        q_b, r_b = torch.linalg.qr(delta.b.double() * delta.scale)
        q_a, r_a = torch.linalg.qr(delta.a.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        return q_b @ u, s, vh @ q_a.T
    if delta.d.ndim != 2:
        raise ValueError(f"expected a matrix, found shape {list(delta.shape)}")
    u, s, vh = torch.linalg.svd(delta.d.double(), full_matrices=False)
    return u, s, vh


def _rank_of(s: Tensor, energy: float) -> int:
    """The smallest number of singular values, at least 1, that hold a share of the sum of squares."""
    sums = s.square().cumsum(0)
    return 1 + int((sums < energy * sums[-1]).sum())
