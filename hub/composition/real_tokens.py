"""The tokens that a model reads and that are not padding, found in any form of attention mask.

Shapes: B rows, H heads, S tokens that are read now, K tokens with those in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from experthub.hub.errors import UsageError
from torch import Tensor

MASKED = -1000.0  # The entries of a mask that is added to scores are lower where it hides a token.


def find_real_tokens(
    mask: Any, positions: Any, cache: Any, rows: int, tokens: int
) -> Tensor | None:
    """Find the tokens that are not padding.

    A token that is not padding attends to itself, so the diagonal of a mask of pairs of tokens tells.

    Args:
        mask: The attention mask: `[B, K]`, `[B, S, K]`, `[B, H, S, K]`, a block mask, or one of these
            by type of layer. None hides nothing.
        positions: The positions of the tokens `[B, S]`, or None.
        cache: The key/value cache, or None.
        rows: The number of rows B.
        tokens: The number of tokens S.

    Returns:
        A boolean mask `[B, S]`; None if all tokens are real.

    Raises:
        UsageError: A row holds several sequences.
    """
    if isinstance(mask, Mapping):
        own = [one for one in mask.values() if one is not None]
        mask = min(own, key=lambda one: one.ndim if isinstance(one, Tensor) else 4, default=None)
    if mask is None:
        if cache is None and isinstance(positions, Tensor):
            _refuse_packed(positions)
        return None
    start = _find_length(cache)
    if hasattr(mask, "mask_mod"):
        return _read_block_mask(mask, start, rows, tokens)
    width = mask.shape[-1]
    if width < tokens:
        return None  # The mask belongs to other inputs.
    first = torch.as_tensor(start, device=mask.device).clamp(max=width - tokens)
    place_S = first + torch.arange(tokens, device=mask.device)
    if mask.ndim == 2:
        found = mask.index_select(1, place_S)
    else:
        pairs_BHSK = mask if mask.ndim == 4 else mask[:, None]
        found = pairs_BHSK[:, 0, -tokens:].gather(-1, place_S.expand(len(mask), -1)[..., None])[
            ..., 0
        ]
    added = mask.ndim > 2 and mask.is_floating_point()
    real: Tensor = found > MASKED if added else found != 0
    return real.expand(rows, -1)


def _find_length(cache: Any) -> Any:
    """Return the number of tokens in a cache: an integer or a tensor of one."""
    try:
        return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    except ValueError:  # A cache without attention does not count its tokens.
        return 0


def _read_block_mask(mask: Any, start: Any, rows: int, tokens: int) -> Tensor:
    """Evaluate the function of a block mask at every token and itself."""
    device = mask.kv_num_blocks.device
    row_B1 = torch.arange(rows, device=device)[:, None]
    query_1S = torch.arange(tokens, device=device)[None]
    width = mask.shape[-1]
    first = torch.as_tensor(start, device=device).clamp(max=width - tokens)
    found: Tensor = mask.mask_mod(row_B1, torch.zeros_like(row_B1), query_1S, query_1S + first)
    return found.expand(rows, tokens)


def _refuse_packed(positions: Tensor) -> None:
    """Refuse rows that hold several sequences, which transformers recognises by their positions."""
    if positions.ndim != 2 or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=-1) != 1).any()):
        raise UsageError(
            "the positions put several sequences into one row, and the router decides for whole rows",
            "pass one sequence per row, with an attention_mask for padding",
        )
