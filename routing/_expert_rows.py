"""One factor, A or B, of all experts of a module or of a group of modules, as one matrix.

Shapes: E experts, r the largest rank, N rows of all experts, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """The rows `[r_e, C]` of each expert, one expert below the other.

    Attributes:
        matrix: The rows of all experts, then any others, then a row of zeros if ranks differ.
        own: The rows of all experts `[N, C]`, a view.
        rank: The largest rank, here or in what the rows are used with.
        row_r: `0, ..., r - 1`.
        by_expert: The same rows `[E, r, C]`, a view; empty if ranks differ.
        places_Er: If ranks differ, the place of each row of an expert in `matrix`; the row of zeros
            stands for rows that an expert lacks.
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
            parts: The rows in any number of tensors `[., C]`.  A single one may end with the row of
                zeros that differing ranks need.
            ranks: The rank of each expert.
            rank: The largest rank, here or in what the rows are used with.
            below: Other rows `[., C]`, which are put below those of the experts.
            like: Tensor whose dtype and device the result has; None keeps those of the parts.

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
        """Take the views, once: a slice costs microseconds, which count for one token."""
        own, rank = matrix[:count], len(row_r)
        by_expert = (own if places_Er is None else own[:0]).view(-1, rank, matrix.shape[1])
        return cls(matrix, own, rank, row_r, by_expert, places_Er)

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertRows:
        """Apply a function to each tensor, such as a move to another device.

        Args:
            change: Function of one tensor, which keeps its shape.

        Returns:
            The changed rows.
        """
        places_Er = None if self.places_Er is None else change(self.places_Er)
        return self._of_matrix(change(self.matrix), len(self.own), change(self.row_r), places_Er)

    def gather(self, experts_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy the rows of some experts.

        Args:
            experts_N: Places of experts `[N]`.
            dtype: That of the result.

        Returns:
            `[N r, C]`.
        """
        if self.places_Er is None:
            found = self.by_expert.index_select(0, experts_N).flatten(0, 1)
        else:
            found = self.matrix.index_select(0, self.places_Er[experts_N].view(-1))
        return found if found.dtype == dtype else found.to(dtype)

    def locate(self, experts_TK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a matrix, and which of its rows are those of the chosen experts.

        Args:
            experts_TK: Places of experts `[T, K]`.
            dtype: That of the matrix.

        Returns:
            The matrix `[., C]` and the places `[T, K r]` in it.  The matrix is `own` if that has the
            dtype and ranks are equal, and otherwise a copy of the rows of the chosen experts.
        """
        if self.places_Er is None and self.own.dtype == dtype:
            return self.own, self._places_of(experts_TK)
        n_experts = len(self.by_expert if self.places_Er is None else self.places_Er)
        some_E = torch.zeros(n_experts, dtype=torch.bool, device=experts_TK.device)
        some_E[experts_TK] = True
        rows = self.gather(some_E.nonzero().squeeze(1), dtype)
        return rows, self._places_of((some_E.cumsum(0) - 1)[experts_TK])

    def _places_of(self, experts_TK: Tensor) -> Tensor:
        """Return the places `[T, K r]` of experts' rows in a matrix where each expert has r."""
        return ((experts_TK * self.rank).unsqueeze(-1) + self.row_r).flatten(1)
