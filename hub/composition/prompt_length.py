"""The part of each row that is its prompt, if a model reads more than the prompt at once.

A router that chooses for whole rows chooses by the prompt. A forward pass may read tokens behind it
too: the choices of a question, or tokens that assisted generation guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor

# Thread-local, because threads share a model; torch.compile can trace thread-local data.
_thread = local()


@contextmanager
def decide_by(lengths: Tensor | int) -> Iterator[None]:
    """Let routers that choose for whole rows look at the first tokens of each row only.

    Args:
        lengths: The number of these tokens for each row `[B, 1]`, or one number for all rows.

    Yields:
        Nothing.
    """
    before = getattr(_thread, "lengths", None)
    _thread.lengths = lengths
    try:
        yield
    finally:
        _thread.lengths = before


def select_prompt(real_BS: Tensor | None, rows: int, tokens: int, device: Any) -> Tensor | None:
    """Select the tokens by which routers choose, among those that a forward pass reads.

    Args:
        real_BS: A mask of the tokens that are not padding; None means all.
        rows: The number of rows B.
        tokens: The number of tokens S that are read.
        device: The device of the result.

    Returns:
        The mask `[B, S]`; None means all tokens.
    """
    lengths: Tensor | int | None = getattr(_thread, "lengths", None)
    if lengths is None or (isinstance(lengths, int) and lengths >= tokens):
        return real_BS
    within_BS = (torch.arange(tokens, device=device) < lengths).expand(rows, tokens)
    return within_BS if real_BS is None else real_BS & within_BS
