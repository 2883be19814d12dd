"""Forward passes of a frozen model that read soft prompts or prefixes before each text.

A soft prompt stands directly before the first token of a row, behind padding on the left, so that
distances do not depend on the padding. A prefix is put into the key/value cache before everything.
The number of virtual tokens of each row stays with the row in the cache.

Shapes: B rows, S tokens that are read now, W tokens of the attention mask, N virtual tokens, E
experts, H hidden features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.composition.row_cache import (
    RowCache,
    find_cache,
    find_returned_cache,
    find_row_cache,
)
from experthub.hub.errors import UsageError
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

KEY = ("soft prompts", "real")  # Of the mask of virtual tokens in the cache.
PLAIN = "pass attention_mask [rows, tokens], and a DynamicCache or no cache"


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """The soft prompts or prefixes of E experts, padded in front to one number of tokens N.

    Args:
        tensors: `prompt` `[E, N, H]`, or `keys` and `values` `[E, layers, heads, N, features]`.
        real_EN: A mask that is false for the padding.
    """

    tensors: Mapping[str, Tensor]
    real_EN: Tensor

    def take(self, name: str, expert_B: Tensor, like: Tensor) -> Tensor:
        """Take a tensor of the expert of each row.

        Args:
            name: The name of the tensor.
            expert_B: The expert of each row.
            like: A tensor whose device and dtype the result gets.

        Returns:
            The tensors of the experts, stacked over the rows.
        """
        whole = self.tensors[name]
        return whole[expert_B.to(whole.device)].to(like)


@dataclass(eq=False)
class PromptedForward:
    """A function in place of the `forward` of a causal language model's base model.

    Args:
        forward: The model's own `forward`.
        model: The language model.
        virtual: The soft prompts or prefixes.
        choose: A function of the inputs and of a mask `[B, S]` that returns the expert `[B]` of each row.
        called: Whether it was called yet.
    """

    forward: Callable[..., Any]
    model: Any
    virtual: VirtualTokens
    choose: Callable[[Tensor, Tensor], Tensor]
    called: bool = False

    def check_called(self, model: Any, args: Any, output: Any) -> None:
        """Refuse outputs that a model computed past this function, and so without soft prompts.

        It is a forward hook of the language model.

        Args:
            model: The language model.
            args: Its arguments.
            output: Its outputs.

        Raises:
            UsageError: The model computes its outputs in another way.
        """
        if not self.called:
            raise UsageError(
                f"a {type(model).__name__} calls its layers in a way that leaves soft prompts out",
                "use another base, or train a LoRA with hub train lora",
            )

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the model's own `forward`, which transformers reads."""
        return inspect.signature(self.forward)

    @property
    def is_prefix(self) -> bool:
        """True for prefixes."""
        return "keys" in self.virtual.tensors

    @property
    def reads_right_padding_only(self) -> bool:
        """True if padding between a prefix and a text would count as distance, in sliding windows."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return self.is_prefix and any(cache.is_sliding)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass; its outputs have no virtual tokens."""
        self.called = True
        names = [n for n, p in self.__signature__.parameters.items() if p.kind is not p.VAR_KEYWORD]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("cache_position", None)  # The model counts the tokens in the cache itself.
        _refuse_other_inputs(given)
        cache = find_cache(given)
        embeds = given.get("inputs_embeds")
        read = given["input_ids"] if embeds is None else embeds
        rows, tokens = read.shape[:2]
        kept, past = find_row_cache(cache), _count_past(cache)
        real_BN = None if kept is None else kept.rows.get(KEY)
        if real_BN is None and past:
            raise UsageError(
                "the key/value cache was filled by another model, without the soft prompts",
                "pass a cache that this composition returned, or none",
            )
        before = 0 if real_BN is None else past - real_BN.shape[1]
        mask_BW = _find_mask(given, rows, before + tokens, read.device)
        first = real_BN is None
        if real_BN is None:
            expert_B = self.choose(read, mask_BW[:, -tokens:] != 0).to(read.device)
            real_BN = self.virtual.real_EN.to(read.device)[expert_B]
        leading_B1 = (mask_BW.cumsum(1) == 0).sum(1, keepdim=True)
        if self.is_prefix:
            self._check_windows(leading_B1, real_BN.shape[1] + mask_BW.shape[1])
            leading_B1 = torch.zeros_like(leading_B1)
        own_BS = _find_positions(given, mask_BW, tokens) + real_BN.sum(1, keepdim=True)
        given["attention_mask"] = _insert(real_BN.to(mask_BW.dtype), mask_BW, leading_B1)
        if first and not self.is_prefix:
            embeds = self.model.get_input_embeddings()(read) if embeds is None else embeds
            prompts_BNH = self.virtual.take("prompt", expert_B, embeds)
            given |= {"input_ids": None, "inputs_embeds": _insert(prompts_BNH, embeds, leading_B1)}
            own_BS = _insert((real_BN.cumsum(1) - 1).clamp(min=0), own_BS, leading_B1)
        elif first:
            given["past_key_values"] = self._fill(cache, expert_B)
        if "position_ids" in names:
            given["position_ids"] = own_BS
        output = self.forward(**given)
        _keep(find_returned_cache(output), real_BN)
        inserted = real_BN.shape[1] if first and not self.is_prefix else 0
        return _remove(output, leading_B1, tokens, inserted)

    def _check_windows(self, leading_B1: Tensor, width: int) -> None:
        """Refuse padding between a prefix and a text that is longer than a sliding window."""
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if self.reads_right_padding_only and bool(leading_B1.any()) and width > int(window or 0):
            raise UsageError(
                f"rows with padding on the left reach beyond the sliding window of {window} tokens, "
                "where the padding would separate the prefix from the text",
                "use padding on the right, or pass rows of one length",
            )

    def _fill(self, cache: Any, expert_B: Tensor) -> Any:
        """Put the prefixes of rows into a cache, or into a new one."""
        if cache is None:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        like = self.model.get_input_embeddings().weight.new_empty(0, dtype=self.model.dtype)
        keys, values = (self.virtual.take(name, expert_B, like) for name in ("keys", "values"))
        for layer in range(keys.shape[1]):
            cache.update(keys[:, layer], values[:, layer], layer)
        return cache


def _refuse_other_inputs(given: Mapping[str, Any]) -> None:
    """Refuse token types, which virtual tokens do not have."""
    if given.get("token_type_ids") is not None:
        raise UsageError("virtual tokens have no token types", "remove token_type_ids")


def _count_past(cache: Any) -> int:
    """Count the tokens in a cache; refuse one that cannot hold more tokens than the model was given."""
    if cache is None:
        return 0
    known = (DynamicLayer, DynamicSlidingWindowLayer, RowCache)
    other = next((layer for layer in cache.layers if type(layer) not in known), None)
    if other is not None:
        raise UsageError(
            f"soft prompts need a cache that grows, and this one has a {type(other).__name__}",
            PLAIN,
        )
    return int(cache.get_seq_length())


def _find_mask(given: Mapping[str, Any], rows: int, width: int, device: Any) -> Tensor:
    """Return the attention mask of the tokens that were read and of those that are read now."""
    mask = given.get("attention_mask")
    if mask is None:
        return torch.ones(rows, width, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (rows, width):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(
            f"soft prompts need an attention mask of {[rows, width]}, and this one is {found}",
            PLAIN,
        )
    return mask


def _find_positions(given: Mapping[str, Any], mask_BW: Tensor, tokens: int) -> Tensor:
    """Return the positions `[B, S]` of the tokens that are read, without virtual tokens."""
    positions = given.get("position_ids")
    if positions is None:
        counted: Tensor = (mask_BW.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        return counted
    if positions.ndim != 2:
        raise UsageError(
            f"expected position_ids [rows, tokens], found {list(positions.shape)}",
            "remove position_ids",
        )
    expanded: Tensor = positions.expand(len(mask_BW), -1)
    return expanded


def _insert(new: Tensor, old: Tensor, leading_B1: Tensor) -> Tensor:
    """Insert entries `[B, N, ...]` into `[B, S, ...]`, in each row behind its leading entries."""
    count, device = new.shape[1], old.device
    place_T = torch.arange(count + old.shape[1], device=device)
    source_BT = torch.where(
        place_T < leading_B1,
        place_T + count,
        torch.where(place_T < leading_B1 + count, place_T - leading_B1, place_T),
    )
    both = torch.cat([new, old], 1)
    return both[torch.arange(len(both), device=device)[:, None], source_BT]


def _remove(output: Any, leading_B1: Tensor, tokens: int, count: int) -> Any:
    """Remove the virtual tokens from the hidden states in the outputs of a model."""
    if not count:
        return output
    place_S = torch.arange(tokens, device=leading_B1.device)
    place_BS = torch.where(place_S < leading_B1, place_S, place_S + count)
    row_B1 = torch.arange(len(place_BS), device=place_BS.device)[:, None]

    def cut(hidden: Tensor) -> Tensor:
        return hidden[row_B1.to(hidden.device), place_BS.to(hidden.device)]

    if not isinstance(output, dict):
        return (cut(output[0]), *output[1:])
    output["last_hidden_state"] = cut(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(cut(one) for one in output["hidden_states"])
    return output


def _keep(cache: Any, real_BN: Tensor) -> None:
    """Store the mask of virtual tokens beside the keys of its rows."""
    if cache is None:
        return
    kept = find_row_cache(cache)
    if kept is None:
        kept = RowCache(bool(getattr(cache.layers[0], "is_sliding", False)))
        cache.layers.append(kept)
    kept.rows[KEY] = real_BN
