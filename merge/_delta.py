"""The change of one weight: low-rank or dense.

Shapes: O rows and I columns of the weight, R the rank, N matrices in a stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of a weight, `scale * b @ a`; the product is formed only on request.

    A weight may be a stack of N matrices, as the experts of a fused mixture are. Its factors are
    stacks, too.

    Args:
        a: The factor A `[R, I]` or `[N, R, I]`.
        b: The factor B `[O, R]` or `[N, O, R]`, in the dtype and on the device of A.
        scale: Any number that the dtype can hold; for a LoRA it is `alpha / r`.

    Raises:
        ValueError: The ranks, dtypes or devices of the factors differ, or the dtype cannot hold the
            scale.

    Example:
        >>> LowRank(torch.ones(1, 3), torch.ones(2, 1), scale=0.5).dense()
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        stacks = self.a.shape[:-2], self.b.shape[:-2]
        alike = self.a.ndim in (2, 3) and self.a.ndim == self.b.ndim and stacks[0] == stacks[1]
        if not alike or self.a.shape[-2] != self.b.shape[-1]:
            raise ValueError(
                f"expected a [R, I] and b [O, R] of one rank, "
                f"found {list(self.a.shape)} and {list(self.b.shape)}"
            )
        if not self.a.is_floating_point() or self.a.dtype != self.b.dtype:
            raise ValueError(f"expected one float dtype, found {self.a.dtype} and {self.b.dtype}")
        if self.a.device != self.b.device:
            raise ValueError(f"expected one device, found {self.a.device} and {self.b.device}")
        if not abs(self.scale) <= torch.finfo(self.a.dtype).max:
            raise ValueError(f"expected a factor that fits {self.a.dtype}, found {self.scale:g}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(O, I)` or `(N, O, I)` of the weight."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def rank(self) -> int:
        """The rank R of the factors."""
        return self.a.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.a.dtype

    def scaled(self, factor: float | Tensor) -> LowRank:
        """Multiply the change by a number; the result stays low-rank.

        Args:
            factor: Any number. Gradients flow to a scalar tensor.

        Returns:
            The multiplied change, of the same rank.
        """
        if isinstance(factor, Tensor):
            return LowRank(self.a, self.b * (factor * self.scale).to(self.b.dtype))
        return LowRank(self.a, self.b, self.scale * factor)

    def transpose(self) -> LowRank:
        """Transpose the change, for a weight that is stored as `[I, O]`.

        Returns:
            The change with the factors swapped, of the same rank.
        """
        return LowRank(self.b.mT.contiguous(), self.a.mT.contiguous(), self.scale)

    def dense(self) -> Tensor:
        """Compute the product of the factors.

        Returns:
            The change as a new tensor `[O, I]`.
        """
        return (self.b @ self.a).mul_(self.scale)

    def add_to(self, weight: Tensor) -> Tensor:
        """Add the change to a weight: `weight + scale * b @ a`.

        Args:
            weight: The weight `[O, I]`; it is not changed.

        Returns:
            A new tensor in the weight's dtype and on its device. The sum is computed in the wider one
            of the two dtypes.
        """
        wide = torch.promote_types(weight.dtype, self.dtype)
        a, b = self.a.to(weight.device, wide), self.b.to(weight.device, wide)
        add = torch.addmm if a.ndim == 2 else torch.baddbmm
        return add(weight.to(wide), b, a, alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense change of a parameter: a tensor of the parameter's own shape.

    Args:
        d: The change, a float tensor.

    Raises:
        ValueError: The tensor is not a float tensor.
    """

    d: Tensor

    def __post_init__(self) -> None:
        if not self.d.is_floating_point():
            raise ValueError(f"expected a float dtype, found {self.d.dtype}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.d.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the change."""
        return self.d.dtype

    def scaled(self, factor: float | Tensor) -> Dense:
        """Multiply the change by a number.

        Args:
            factor: Any number. Gradients flow to a scalar tensor.

        Returns:
            The multiplied change.
        """
        return Dense(self.d * factor)

    def dense(self) -> Tensor:
        """Return the change as a tensor.

        Returns:
            The tensor of this change, not a copy.
        """
        return self.d

    def add_to(self, weight: Tensor) -> Tensor:
        """Add the change to a parameter: `weight + d`.

        Args:
            weight: A parameter of the same shape; it is not changed.

        Returns:
            A new tensor in the parameter's dtype and on its device. The sum is computed in the wider
            one of the two dtypes.
        """
        wide = torch.promote_types(weight.dtype, self.dtype)
        return (weight.to(wide) + self.d.to(weight.device, wide)).to(weight.dtype)


Delta = LowRank | Dense


def sum_deltas(deltas: Sequence[Delta]) -> Delta:
    """Sum changes of one weight exactly.

    If all changes are low-rank, their factors are concatenated and the sum stays low-rank.

    Args:
        deltas: One or more changes of the same shape.

    Returns:
        The sum. A single change is returned as it is.

    Raises:
        ValueError: There is no change, or the shapes differ.
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
        a = torch.cat([delta.a for delta in low], -2)
        b = torch.cat([delta.b for delta in low], -1)
        if len({delta.scale for delta in low}) == 1:
            return LowRank(a, b, low[0].scale)
        scales = [delta.scale for delta in low for _ in range(delta.rank)]
        return LowRank(a, b * torch.tensor(scales, dtype=b.dtype, device=b.device))
    return Dense(torch.stack([delta.dense() for delta in deltas]).sum(0))


def truncate(delta: Delta, rank: int | None = None, energy: float | None = None) -> LowRank:
    """Approximate a change by one of lower rank, optimally in the Frobenius norm.

    The dense form of a low-rank change is never computed. QR of both factors and an SVD of the
    `[R, R]` core take `O((O + I) R^2)`.

    Args:
        delta: The change of a matrix, or of a stack of matrices, which get one rank.
        rank: The rank of the result, at least 1. A low-rank change whose rank is not higher is
            returned as it is.
        energy: An alternative to `rank`, above 0 and at most 1. It selects the smallest rank, at
            least 1, whose squared singular values are this share of the sum of all of them.

    Returns:
        The truncated change, in the dtype of `delta`.

    Raises:
        ValueError: Both or none of `rank` and `energy` are given, one of them is out of its range,
            or the change is not finite, or neither a matrix nor a stack of matrices.
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
    kept = rank if rank is not None else _find_rank(s, energy or 1)
    root = s[..., :kept].sqrt()
    dtype = delta.dtype
    return LowRank(
        (root[..., None] * vh[..., :kept, :]).to(dtype).contiguous(),
        (u[..., :kept] * root[..., None, :]).to(dtype).contiguous(),
    )


def _svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the singular vectors and values of a change in double precision."""
    factors = (delta.a, delta.b) if isinstance(delta, LowRank) else (delta.d,)
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise ValueError("expected finite changes, found NaN or infinity")
    if isinstance(delta, LowRank):
        q_b, r_b = torch.linalg.qr(delta.b.double() * delta.scale)
        q_a, r_a = torch.linalg.qr(delta.a.double().mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
        return q_b @ u, s, vh @ q_a.mT
    if delta.d.ndim not in (2, 3):
        raise ValueError(f"expected a matrix or a stack of them, found shape {list(delta.shape)}")
    u, s, vh = torch.linalg.svd(delta.d.double(), full_matrices=False)
    return u, s, vh


def _find_rank(s: Tensor, energy: float) -> int:
    """Find how many singular values, at least one, make up a share of the sum of all squares."""
    sums = s.square().cumsum(-1)
    return 1 + int((sums < energy * sums[..., -1:]).sum(-1).max())
