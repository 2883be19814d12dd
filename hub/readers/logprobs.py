"""Log-probabilities of choices after prompts, under a causal language model.

Shapes: B prompts or choices in a batch, T tokens, K positions with logits, V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from experthub.hub.composition.prompt_length import decide_by
from experthub.hub.readers.graph_memory import CACHED_POSITIONS, SUM_ENTRIES, count_logits_bytes
from experthub.hub.readers.reader import find_pad_token, pad, repeat_rows
from experthub.hub.readers.rotary import find_rotary_limit
from experthub.hub.readers.tokens import Encoded
from experthub.hub.readers.window import has_reserved_positions
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

OnMask = Callable[[Tensor], None]


def count_positions(model: Any) -> int:
    """Count the positions of which a forward pass may compute the logits at once.

    Args:
        model: The model.

    Returns:
        The number of positions, at least 1, see `count_logits_bytes`.
    """
    words: int = model.config.get_text_config().vocab_size
    width: int = model.dtype.itemsize
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    return max(1, count_logits_bytes(whole, words * width) // (words * width))


def shares_prompts(model: Any) -> bool:
    """Tell whether the choices of a prompt may continue copies of its cache.

    Models with a recurrent state, such as Mamba, read further tokens one by one only. Some models
    cannot be told the positions of tokens after padding.

    Args:
        model: The causal language model.

    Returns:
        Whether a prompt is read once for all of its choices. Otherwise it is read with each choice.
    """
    # A compiled model has the signature of the module that it compiles.
    inner = getattr(model, "_orig_mod", model)
    known = set(inspect.signature(inner.forward).parameters)
    placed = "position_ids" in known or any("alibi" in n for n in dir(type(inner.base_model)))
    if inner._is_stateful or not placed or "past_key_values" not in known:
        return False
    if getattr(inner.get_decoder().forward, "reads_right_padding_only", False):
        return False
    layers = DynamicCache(config=inner.config.get_text_config(decoder=True)).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    # Positions that begin after a padding index, as in RoBERTa, are the model's own matter.
    return not has_reserved_positions(inner.named_modules())


def sum_logprobs(
    model: Any, items: Sequence[Encoded], on_mask: OnMask = lambda mask: None
) -> Tensor:
    """Sum the log-probabilities of every choice's tokens in one batch, with gradients.

    Args:
        model: The causal language model.
        items: The prompts with their choices.
        on_mask: A function that is called with the mask of a batch, which is false for padding,
            before the model reads it.

    Returns:
        One sum for each choice, in nats, item after item.
    """
    limit = find_rotary_limit(model.config)
    if limit is not None and _measure_batch(items) > limit:
        return _sum_without_padding(model, items, on_mask)
    read = _sum_after_prompts if shares_prompts(model) else _sum_whole_texts
    sums = read(model, items, on_mask)
    return _sum_without_padding(model, items, on_mask) if bool(sums.isnan().any()) else sums


def _measure_batch(items: Sequence[Encoded]) -> int:
    """Return an upper bound of the positions of a batch, those of padding included."""
    longest = max(len(choice) for item in items for choice in item.choices)
    return max(len(item.prompt) for item in items) + longest


def _sum_after_prompts(model: Any, items: Sequence[Encoded], on_mask: OnMask) -> Tensor:
    """Sum the log-probabilities where the choices of a prompt continue copies of its cache."""
    device, token = next(model.parameters()).device, find_pad_token(model)
    prompts, real = pad([item.prompt for item in items], device, left=True, token=token)
    on_mask(real)
    prompt_mask = real.long()
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=prompts,
        attention_mask=prompt_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    first = read.logits[:, -1]  # These logits predict the first token of a choice.
    choices = [choice for item in items for choice in item.choices]
    rows = repeat_rows([len(item.choices) for item in items], device)
    heads = torch.tensor([choice[0] for choice in choices], device=device)
    sums: Tensor = _widen(first[rows, heads]) - _sum_exponentials(first)[rows]
    longer = [i for i, choice in enumerate(choices) if len(choice) > 1]
    if not longer:
        return sums
    cache, parts = read.past_key_values, []
    del read, first  # The logits of the prompts make room for those of the choices.
    fitting = count_positions(model) // (max(map(len, choices)) - 1)
    step = max(1, min(fitting, CACHED_POSITIONS // prompts.shape[1]))
    for at in range(0, len(longer), step):
        own = longer[at : at + step]
        chosen = [choices[i] for i in own]
        parts.append(_sum_remaining(model, cache, chosen, rows[own], prompt_mask, on_mask))
    return sums.index_add(0, torch.tensor(longer, device=device), torch.cat(parts))


def _sum_remaining(
    model: Any,
    cache: Any,
    choices: Sequence[tuple[int, ...]],
    rows: Tensor,
    prompt_mask: Tensor,
    on_mask: OnMask,
) -> Tensor:
    """Sum the log-probabilities of every choice's tokens after the first; the cache stays as it is."""
    token = find_pad_token(model)
    inputs, real = pad([choice[:-1] for choice in choices], rows.device, token=token)
    targets, _ = pad([choice[1:] for choice in choices], rows.device)
    start = prompt_mask.sum(1)[rows]
    steps = torch.arange(inputs.shape[1], device=rows.device)
    on_mask(real)
    logits = model(
        input_ids=inputs,
        attention_mask=torch.cat([prompt_mask[rows], real.long()], dim=1),
        position_ids=start[:, None] + steps,
        past_key_values=_select_rows(cache, rows),
        use_cache=True,
    ).logits
    sums: Tensor = (_choose(logits, targets) * real).sum(1)
    return sums


def _sum_without_padding(model: Any, items: Sequence[Encoded], on_mask: OnMask) -> Tensor:
    """Sum the log-probabilities where only texts of the same length share a batch.

    The rotary positions of some models depend on the longest text of a batch. And a token of
    padding may attend to no token at all. Some models then compute NaN for it, such as models in
    float64 with eager attention: their mask, the lowest number of float64, is minus
    infinity in the float32 of the softmax. From the next layer on every token of the row is NaN,
    because zero times NaN is NaN.
    """
    pairs = [Encoded(item.prompt, (choice,)) for item in items for choice in item.choices]
    lengths = [len(pair.prompt) + len(pair.choices[0]) for pair in pairs]
    sums = [torch.empty(0)] * len(pairs)
    for length in sorted(set(lengths)):
        own = [i for i, n in enumerate(lengths) if n == length]
        found = _sum_whole_texts(model, [pairs[i] for i in own], on_mask)
        for i, value in zip(own, found, strict=True):
            sums[i] = value
    return torch.stack(sums)


def _sum_whole_texts(model: Any, items: Sequence[Encoded], on_mask: OnMask) -> Tensor:
    """Sum the log-probabilities where every choice is read together with its prompt."""
    device, token = next(model.parameters()).device, find_pad_token(model)
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    sums = []
    for own in _group_pairs(pairs, count_positions(model), keeps):
        texts, real = pad([prompt + choice[:-1] for prompt, choice in own], device, token=token)
        starts = torch.tensor([len(prompt) for prompt, _ in own], device=device)
        ends = starts + torch.tensor([len(choice) for _, choice in own], device=device)
        places_T = torch.arange(texts.shape[1], device=device)
        on_mask(real)
        kept_K = places_T[int(starts.min()) - 1 :]
        more = {"logits_to_keep": kept_K} if keeps else {}
        with decide_by(starts[:, None]):
            logits = model(
                input_ids=texts, attention_mask=real.long(), use_cache=False, **more
            ).logits
        targets, _ = pad([prompt + choice for prompt, choice in own], device)
        chosen = (kept_K >= starts[:, None] - 1) & (kept_K < ends[:, None] - 1)
        logits = logits[:, -len(kept_K) :]
        sums.append((_choose(logits, targets[:, kept_K + 1]) * chosen).sum(1))
    return torch.cat(sums)


def _group_pairs(
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], positions: int, keeps: bool
) -> Iterator[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Group prompts with one choice into batches whose logits fit, in order."""
    batch: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    first, last = 0, 0
    for prompt, choice in pairs:
        start, end = len(prompt) - 1 if keeps else 0, len(prompt) + len(choice) - 1
        width = max(last, end) - min(first, start)
        if batch and width * (len(batch) + 1) > positions:
            yield batch
            batch = []
        first, last = (min(first, start), max(last, end)) if batch else (start, end)
        batch.append((prompt, choice))
    yield batch


def _choose(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """Compute the log-probabilities `[B, K]` of tokens, at least in float32."""
    chosen = logits_BKV.gather(-1, targets_BK[..., None])[..., 0]
    return _widen(chosen) - _sum_exponentials(logits_BKV)


def _widen(values: Tensor) -> Tensor:
    """Convert values to float32, unless they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def _sum_exponentials(logits: Tensor) -> Tensor:
    """Compute the logarithm of the sum of exponentials of logits `[..., V]`.

    Row by row, because copies of all logits would take twice their memory.
    """
    flat = logits.flatten(0, -2)
    step = max(1, SUM_ENTRIES // flat.shape[-1])
    parts = [_widen(part).logsumexp(-1) for part in torch.split(flat, step)]
    return torch.cat(parts).view(logits.shape[:-1])


def _select_rows(cache: Any, rows: Tensor) -> Any:
    """Select rows of a key/value cache for one forward pass; the cache itself is not changed.

    The keys and values of a layer are copied when the pass reaches the layer, and are freed behind
    it. The copies of all layers would take much more memory than the prompts' cache.
    """
    found = copy(cache)
    found.layers = [_select_layer_rows(layer, rows) for layer in cache.layers]
    return found


def _select_layer_rows(layer: Any, rows: Tensor) -> Any:
    """Select rows of one layer of a key/value cache."""
    found = copy(layer)
    if not isinstance(layer, DynamicLayer):  # It holds the decisions of routers about rows.
        found.base = None
        found.batch_select_indices(rows)
        found.base = None if layer.base is None else _select_rows(layer.base, rows)
        return found

    def update(*states: Any, **more: Any) -> tuple[Tensor, Tensor]:
        selected = copy(layer)
        selected.batch_select_indices(rows)
        both: tuple[Tensor, Tensor] = selected.update(*states, **more)
        return both

    found.update = update
    return found
