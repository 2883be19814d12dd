"""One matrix of a factor, A or B, of all experts of a module or of a group of modules.

Shapes: E experts, r the largest rank, N rows of all experts, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """The rows `[r_e, C]` of each expert, with one expert below the other.

    Attributes:
        matrix: The rows of all experts, then other rows, then a row of zeros if ranks differ.
        own: The rows of all experts `[N, C]`, a view of `matrix`.
        rank: The largest rank r, here or in the matrix that these rows are used with.
        row_r: The numbers `0, ..., r - 1`.
        by_expert: The rows of all experts `[E, r, C]`, a view of `matrix`; empty if ranks differ.
        places_Er: The position of each row of an expert in `matrix`, where the row of zeros stands for
            rows that an expert lacks; None if all ranks are equal.
    """

    matrix: Tensor
    own: Tensor
    rank: int
    row_r: Tensor
    by_expert: Tensor
    places_Er: Tensor | None

    @classmethod
    def of(
        cls,
        parts: Sequence[Tensor],
        ranks: Sequence[int],
        rank: int,
        *,
        below: Sequence[Tensor] = (),
        like: Tensor | None = None,
    ) -> ExpertRows:
        """Join the rows of experts; a single part is not copied.

        Args:
            parts: The rows in any number of tensors `[., C]`. A single one may end with the row of
                zeros that differing ranks need.
            ranks: The rank of each expert.
            rank: The largest rank, here or in the matrix that these rows are used with.
            below: Other rows `[., C]`, which are put below those of the experts.
            like: A tensor whose dtype and device the result gets; None keeps those of the parts.

        Returns:
            The rows of all experts.
        """
        count, ragged = sum(ranks), ranks.count(rank) != len(ranks)
        whole = len(parts) == 1 and len(parts[0]) == count + ragged and not below
        zero = [parts[0].new_zeros(1, parts[0].shape[1])] if ragged else []
        matrix = parts[0] if whole else torch.cat([*parts, *below, *zero])
        matrix = matrix.to(matrix if like is None else like).contiguous()
        row_r, places_Er = torch.arange(rank), None
        if ragged:
            sizes = torch.tensor(ranks)
            starts, inside = sizes.cumsum(0) - sizes, row_r < sizes[:, None]
            places_Er = torch.where(inside, starts[:, None] + row_r, len(matrix) - 1)
            places_Er = places_Er.to(matrix.device)
        return cls._of_matrix(matrix, count, row_r.to(matrix.device), places_Er)

    @classmethod
    def _of_matrix(
        cls, matrix: Tensor, count: int, row_r: Tensor, places_Er: Tensor | None
    ) -> ExpertRows:
        """Make the views once, because a slice costs microseconds, which matter for one token."""
        own, rank = matrix[:count], len(row_r)
        by_expert = (own if places_Er is None else own[:0]).view(-1, rank, matrix.shape[1])
        return cls(matrix, own, rank, row_r, by_expert, places_Er)

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertRows:
        """Apply a function to each tensor, such as a move to another device.

        Args:
            change: A function of one tensor that keeps its shape.

        Returns:
            The changed rows.
        """
        places_Er = None if self.places_Er is None else change(self.places_Er)
        return self._of_matrix(change(self.matrix), len(self.own), change(self.row_r), places_Er)

    def gather(self, experts_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy the rows of some experts.

        Args:
            experts_N: The positions of the experts `[N]`.
            dtype: The dtype of the result.

        Returns:
            The rows `[N r, C]`.
        """
        if self.places_Er is None:
            found = self.by_expert.index_select(0, experts_N).flatten(0, 1)
        else:
            found = self.matrix.index_select(0, self.places_Er[experts_N].view(-1))
        return found if found.dtype == dtype else found.to(dtype)

    def locate(self, experts_TK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Locate the rows of chosen experts in a matrix.

        Args:
            experts_TK: The positions of the chosen experts `[T, K]`.
            dtype: The dtype of the matrix.

        Returns:
            The matrix `[., C]`, and the positions `[T, K r]` of the rows in it. The matrix is `own` if
            that has the dtype and ranks are equal, and otherwise a copy of the chosen rows.
        """
        if self.places_Er is None and self.own.dtype == dtype:
            return self.own, self._compute_places(experts_TK)
        n_experts = len(self.by_expert if self.places_Er is None else self.places_Er)
        some_E = torch.zeros(n_experts, dtype=torch.bool, device=experts_TK.device)
        some_E[experts_TK] = True
        rows = self.gather(some_E.nonzero().squeeze(1), dtype)
        return rows, self._compute_places((some_E.cumsum(0) - 1)[experts_TK])

    def _compute_places(self, experts_TK: Tensor) -> Tensor:
        """Compute the positions `[T, K r]` of experts' rows in a matrix with r rows per expert."""
        return ((experts_TK * self.rank).unsqueeze(-1) + self.row_r).flatten(1)
