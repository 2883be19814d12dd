"""The part of each row that is its prompt, if a model reads more than the prompt at once.

A router that chooses for whole rows chooses by the prompt. A forward pass may read tokens behind it
too: the choices of a question, or tokens that assisted generation guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(eq=False)
class GenerateByPrompt:
    """A function in place of a model's `generate`, under which routers choose by the prompt alone.

    Prompt lookup and assistants put guessed tokens behind the prompt in the first forward pass.

    Args:
        model: The composed model.
    """

    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the `generate` of the model's class."""
        named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        given = args[0] if args else next((found for found in named if found is not None), None)
        if not isinstance(given, Tensor) or given.ndim < 2:
            return type(self.model).generate(self.model, *args, **kwargs)
        with decide_by(given.shape[1]):
            return type(self.model).generate(self.model, *args, **kwargs)
