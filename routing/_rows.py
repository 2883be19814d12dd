"""Rows of several experts, one below the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Rows:
    """The rows `[r_e, C]` of E experts, and any others below them.

    What a rank lower than the largest lacks is stood for by a row of zeros at the end.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        ranks: Sequence[int],
        rank: int,
        like: Tensor,
        below: Sequence[Tensor] = (),
        mapped: bool = False,
    ) -> None:
        """parts: the rows in any number of parts, with the row of zeros or without.  rank: the
        largest, of these and of what they are used with.  like: whose dtype and device all get.
        mapped: they keep their dtype.
        """
        self.count, self.rank = sum(ranks), rank
        self.ragged = ranks.count(rank) != len(ranks)
        whole = len(parts) == 1 and len(parts[0]) == self.count + self.ragged and not below
        zero = [parts[0].new_zeros(1, parts[0].shape[1])] if self.ragged else []
        all_rows = parts[0] if whole else torch.cat([*parts, *below, *zero])
        all_rows = all_rows.to(like.device) if mapped else all_rows.to(like)
        self.others = slice(self.count, self.count + sum(map(len, below)))
        self.n_experts, self.row_r = len(ranks), torch.arange(rank)
        self.places_Er: Tensor | None = None  # only where they are not to be computed
        if self.ragged:
            sizes = torch.tensor(ranks)
            starts, inside = sizes.cumsum(0) - sizes, self.row_r < sizes[:, None]
            self.places_Er = torch.where(inside, starts[:, None] + self.row_r, len(all_rows) - 1)
        self.all = all_rows.contiguous()
        self.apply(lambda tensor: tensor.to(like.device))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensors by what a function makes of them: others on another device, say."""
        self.all, self.row_r = change(self.all), change(self.row_r)
        self.places_Er = None if self.places_Er is None else change(self.places_Er)
        self.own, self.below = self.all[: self.count], self.all[self.others]
        self.read = self.all[: self.others.stop]
        if not self.ragged:
            self.by_expert = self.own.view(self.n_experts, self.rank, self.all.shape[1])

    def copied(self, experts_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of some experts, `[N r, C]`."""
        if self.places_Er is None:
            found = self.by_expert.index_select(0, experts_N).flatten(0, 1)
        else:
            found = self.all.index_select(0, self.places_Er[experts_N].view(-1))
        return found if found.dtype == dtype else found.to(dtype)

    def once(self, experts_TK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows, and where among them those of chosen experts are, `[T, K r]`.

        All rows where they are; in another dtype, or of unequal ranks, a copy of those chosen.
        """
        if self.all.dtype == dtype and not self.ragged:
            return self.own, self._rows_of(experts_TK)
        some_E = torch.zeros(self.n_experts, dtype=torch.bool, device=experts_TK.device)
        some_E[experts_TK] = True
        rows = self.copied(some_E.nonzero().squeeze(1), dtype)
        return rows, self._rows_of((some_E.cumsum(0) - 1)[experts_TK])

    def _rows_of(self, experts_TK: Tensor) -> Tensor:
        """Where the rows of experts are, `[T, K r]`, if all have as many."""
        return ((experts_TK * self.rank).unsqueeze(-1) + self.row_r).flatten(1)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts as one, not copied if they are one."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])
