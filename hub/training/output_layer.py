"""Logits of a causal language model at some positions, with its output layer at these alone.

Shapes: B examples, T tokens, N chosen positions, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class OutputLayer:
    """The output layers of models, each with a note whether it is all that makes the logits."""

    def __init__(self) -> None:
        self._plain: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def compute_logits(self, model: Any, read: Mapping[str, Tensor], chosen_BT: Tensor) -> Tensor:
        """Compute the logits at chosen positions.

        The output layer would cost more than the rest of the model on short prompts.

        Args:
            model: The causal language model.
            read: Its inputs `[B, T]`.
            chosen_BT: A mask of the positions.

        Returns:
            The logits `[N, V]`.
        """
        if not self._is_plain(model, read):
            whole: Tensor = model(**read).logits
            return whole[chosen_BT]
        hidden_BTD = model.base_model(**read).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(hidden_BTD[chosen_BT])
        return logits

    @torch.no_grad()
    def _is_plain(self, model: Any, read: Mapping[str, Tensor]) -> bool:
        """Tell whether a model's logits are its output layer's; some models scale or cap them.

        The first batch that a model reads decides it.
        """
        if model not in self._plain:
            mode = model.training
            model.eval()  # Dropout would make a difference of its own.
            hidden = model.base_model(**read).last_hidden_state[:1, -1:]
            wanted = model(**read).logits[:1, -1:]
            difference = (model.get_output_embeddings()(hidden) - wanted).abs().max()
            model.train(mode)
            self._plain[model] = bool(difference <= 1e-5 * wanted.abs().max())
        return self._plain[model]
