"""A layer of a key/value cache that holds the decisions of routers about each row.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experthub.routing import RowKey
from torch import Tensor


@dataclass
class RowCache:
    """A layer of a key/value cache that holds what is known about each row, and no keys.

    Its methods and its flags are those that transformers expects of a cache layer.

    Args:
        rows: Decisions `[B, ...]` of routers about each row.
        base: The cache of the base's own forward pass, for routers that read hidden states.
    """

    rows: dict[RowKey, Tensor] = field(default_factory=dict)
    base: Any = None
    is_sliding: bool = False
    is_compileable: bool = True
    is_croppable: bool = True
    supports_early_init: bool = False
    is_initialized: bool = True

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to the tensor of every name."""
        self.rows = {name: change(tensor) for name, tensor in self.rows.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows.

        Args:
            indices: The positions of the rows `[n]`.
        """
        self._change(lambda tensor: tensor[indices])
        if self.base is not None:
            self.base.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Args:
            repeats: The number of copies of each row.
        """
        self._change(lambda tensor: tensor.repeat_interleave(repeats, 0))
        if self.base is not None:
            self.base.batch_repeat_interleave(repeats)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows into another order, as a beam search does.

        Args:
            beam_idx: The position `[B]` of the row that comes to each place.
        """
        self._change(lambda tensor: tensor.index_select(0, beam_idx))
        if self.base is not None:
            self.base.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; what is known about a row does not depend on them.

        Args:
            tokens_to_remove: The number of tokens.
        """
        if self.base is not None:
            self.base.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all rows."""
        self.rows = {}
        self.base = None

    def get_seq_length(self) -> int:
        """Return the number of cached tokens.

        Returns:
            0, because this layer holds no keys.
        """
        return 0

    def offload(self) -> None:
        """Do nothing: there are no keys to move to the CPU."""

    def prefetch(self) -> None:
        """Do nothing: there are no keys to move to the device."""


def find_row_cache(cache: Any) -> RowCache | None:
    """Find the layer of a key/value cache that holds what is known about its rows.

    Args:
        cache: The cache, or None.

    Returns:
        The layer; None if the cache has none.
    """
    layers = getattr(cache, "layers", ())
    return next((layer for layer in layers if isinstance(layer, RowCache)), None)
