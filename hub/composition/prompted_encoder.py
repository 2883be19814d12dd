"""Encoder-decoders that read a soft prompt before each text.

Shapes: B rows, W tokens of the attention mask, N virtual tokens, H hidden features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.errors import UsageError
from torch import Tensor


@dataclass(eq=False)
class PromptedEncoder:
    """A function in place of the `forward` of the encoder of an encoder-decoder.

    Its outputs have the virtual tokens, which the decoder attends to.

    Args:
        forward: The encoder's own `forward`.
        model: The encoder-decoder.
        prompt_NH: The soft prompt.
    """

    forward: Callable[..., Any]
    model: Any
    prompt_NH: Tensor

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the encoder's own `forward`, which transformers reads."""
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder with the soft prompt before each text."""
        given = {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.model.get_input_embeddings()(given["input_ids"])
        mask, rows = given.get("attention_mask"), len(embeds)
        prompts = self.prompt_NH.to(embeds).expand(rows, -1, -1)
        given |= {"input_ids": None, "inputs_embeds": torch.cat([prompts, embeds], 1)}
        if mask is not None:
            given["attention_mask"] = extend_mask(mask, len(self.prompt_NH))
        return self.forward(**given)


@dataclass(eq=False)
class PromptedDecoder:
    """A function in place of the `forward` of the decoder behind a `PromptedEncoder`.

    Args:
        forward: The decoder's own `forward`.
        count: The number of virtual tokens N.
    """

    forward: Callable[..., Any]
    count: int

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the decoder's own `forward`, which transformers reads."""
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder with a mask of the text to which the virtual tokens are added."""
        given = {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}
        if given.get("encoder_attention_mask") is not None:
            given["encoder_attention_mask"] = extend_mask(
                given["encoder_attention_mask"], self.count
            )
        return self.forward(**given)


def extend_mask(mask: Tensor, count: int) -> Tensor:
    """Put virtual tokens before the tokens of an attention mask.

    Args:
        mask: The mask `[B, W]`.
        count: The number of virtual tokens N.

    Returns:
        The mask `[B, N + W]`.

    Raises:
        UsageError: The mask has other dimensions.
    """
    if mask.ndim != 2:
        raise UsageError(
            f"soft prompts cannot extend a mask {list(mask.shape)}",
            "pass attention_mask [rows, tokens]",
        )
    return torch.cat([mask.new_ones(len(mask), count), mask], 1)
