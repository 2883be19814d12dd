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
    ) -> None:
        """parts: the rows in any number of parts, with the row of zeros or without.  rank: the
        largest, of these and of what they are used with.  like: whose dtype and device all get.
        """
        self.count, self.rank = sum(ranks), rank
        self.ragged = set(ranks) != {rank}
        whole = len(parts) == 1 and len(parts[0]) == self.count + self.ragged and not below
        zero = [parts[0].new_zeros(1, parts[0].shape[1])] if self.ragged else []
        all_rows = parts[0] if whole else torch.cat([*parts, *below, *zero])
        all_rows = all_rows.to(like)
        self.others = slice(self.count, self.count + sum(map(len, below)))
        sizes = torch.tensor(ranks)
        row = torch.arange(self.rank)
        starts = sizes.cumsum(0) - sizes
        places_Er = torch.where(row < sizes[:, None], starts[:, None] + row, len(all_rows) - 1)
        self._set(all_rows.contiguous(), places_Er.to(all_rows.device))

    def _set(self, rows: Tensor, places_Er: Tensor) -> None:
        self.all, self.places_Er = rows, places_Er
        self.own, self.below = rows[: self.count], rows[self.others]
        self.read = rows[: self.others.stop]
        self.by_expert = (
            None if self.ragged else self.own.view(len(places_Er), self.rank, rows.shape[1])
        )

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensors by what a function makes of them: others on another device, say."""
        self._set(change(self.all), change(self.places_Er))

    def places(self, experts_TK: Tensor) -> Tensor:
        """Where the rows of chosen experts are, `[T, K r]`."""
        return self.places_Er[experts_TK].flatten(1)

    def copied(self, experts_TK: Tensor) -> Tensor:
        """The rows of chosen experts, `[T, K r, C]`."""
        chosen = experts_TK.reshape(-1)
        if self.by_expert is None:
            found = self.all.index_select(0, self.places_Er[chosen].view(-1))
        else:
            found = self.by_expert.index_select(0, chosen)
        return found.view(len(experts_TK), experts_TK.shape[1] * self.rank, self.all.shape[1])
