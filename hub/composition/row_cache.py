"""A layer of a key/value cache that holds the decisions of routers about each row.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.routing import RowKey
from torch import Tensor
from transformers.cache_utils import DummyLayer

CACHES = ("past_key_values", "cache_params")  # The arguments and outputs that hold a cache.
STATES = (*CACHES, "state", "mems", "past_buckets_states")


class RowCache(DummyLayer):  # type: ignore[misc]
    """A layer of a key/value cache that holds what is known about each row, and no keys.

    Transformers skips such a layer when it offloads layers or looks for their lengths.

    Attributes:
        rows: Decisions `[B, ...]` of routers about each row.
        past: Weights `[B, S, L, E]` of the tokens that were read, by route.
        base: The cache of the base's own forward pass, for routers that read hidden states.
    """

    def __init__(self, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.rows: dict[RowKey, Tensor] = {}
        self.past: dict[str, tuple[Tensor, ...]] = {}
        self.base: Any = None

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to each tensor."""
        self.rows = {name: change(tensor) for name, tensor in self.rows.items()}
        self.past = {route: tuple(map(change, own)) for route, own in self.past.items()}

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
        """Remove the last tokens; the decisions about rows do not depend on them.

        Args:
            tokens_to_remove: The number of tokens.
        """
        for route, own in self.past.items():
            whole = torch.cat(own, 1)
            self.past[route] = (whole[:, : whole.shape[1] - tokens_to_remove],)
        if self.base is not None:
            self.base.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all rows."""
        self.rows, self.past = {}, {}
        self.base = None


def find_cache(holder: Any) -> Any:
    """Find the key/value cache among the arguments or the outputs of a model.

    Args:
        holder: The arguments or the outputs, by name.

    Returns:
        The cache, or None.

    Raises:
        UsageError: The model continues with a state that cannot hold decisions about rows.
    """
    found = [holder[name] for name in CACHES if name in holder and hasattr(holder[name], "layers")]
    if not found and any(name in holder and holder[name] is not None for name in STATES):
        raise UsageError(
            "the router decides for whole rows, and the state of this model cannot hold its decisions",
            "pass use_cache=False, or use a router that chooses for each token",
        )
    return found[0] if found else None


def find_row_cache(cache: Any) -> RowCache | None:
    """Find the layer of a key/value cache that holds what is known about its rows.

    Args:
        cache: The cache, or None.

    Returns:
        The layer; None if the cache has none.
    """
    layers = getattr(cache, "layers", ())
    return next((layer for layer in layers if isinstance(layer, RowCache)), None)


def find_returned_cache(output: Any) -> Any:
    """Find the key/value cache in the outputs of a model, which may be a plain tuple.

    Args:
        output: The outputs.

    Returns:
        The cache, or None.
    """
    if isinstance(output, dict):
        return find_cache(output)
    return next((one for one in output if hasattr(one, "layers")), None)
