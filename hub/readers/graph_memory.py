"""The memory that reading takes, by which batches are made and plans are stated.

With gradients, a forward pass keeps values for the backward pass. Batches that would keep more
than `GRAPH_BYTES` together keep nothing instead, and run a second time in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BATCH_TOKENS = 4096  # Tokens of a batch, with padding; an image counts as one token.
GRAPH_BYTES = 1 << 29
LOGITS_BYTES = 1 << 25  # The logits of one forward pass, or a share of the model if that is more.
LOGITS_SHARE = 16
BATCH_POSITIONS = 2048  # The largest number of positions with logits in one forward pass.
CACHED_POSITIONS = 4 * BATCH_POSITIONS  # The largest number of cached tokens that choices follow.
SUM_ENTRIES = 1 << 20  # The largest number of logits of which exponentials are summed at once.
WIDTH = 4  # Bytes of a float32 number; gradients in half precision lose too much.
# Numbers that a layer keeps for each token, in hidden sizes and in sizes of its inner layer, and
# copies of each logit: itself and its gradient. Its gradient has two parts, one after the other.
PER_HIDDEN, PER_INNER, PER_LOGIT = 8, 4, 2
# The same of the one layer that is computed, without gradients: the residual stream, the normalised
# input, queries, keys, values and output; two projections of the inner layer and their product.
READ_HIDDEN, READ_INNER = 6, 3
# Keys and values stay while other blocks are freed around them. The allocator wastes the gaps: up
# to about this share of the cache was measured.
CACHE_GAPS = 0.4
OTHER_BYTES = 1 << 25  # Masks, tokens, and buffers of the libraries.
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "inner": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim"),
    "words": ("vocab_size",),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "cached heads": ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads"),
    "head": ("head_dim",),
}


def count_graph_bytes(config: Mapping[str, Any], tokens: int, answers: int) -> int:
    """Estimate the bytes that a forward pass keeps for its backward pass.

    Args:
        config: The configuration of the model as plain values.
        tokens: The number of tokens that it reads.
        answers: The number of tokens whose logits it computes over all words.

    Returns:
        The number of bytes.
    """
    hidden = _find(config, "hidden", 0)
    by_token = PER_HIDDEN * hidden + PER_INNER * _find(config, "inner", 4 * hidden)
    numbers = tokens * _find(config, "layers", 1) * by_token
    return WIDTH * (numbers + PER_LOGIT * answers * count_words(config))


def group_rows(
    sizes: Sequence[int], answers: Sequence[int] | None, config: Mapping[str, Any]
) -> list[list[int]]:
    """Group inputs of similar size into batches.

    Args:
        sizes: The number of tokens of each input; 1 for an image.
        answers: For batches with gradients, the number of tokens of each input's answers. They keep
            at most `GRAPH_BYTES` each, unless they are one input or keep no more all together.
            None for batches without gradients.
        config: The configuration of the model as plain values.

    Returns:
        The positions of the inputs in each batch. It has at most `BATCH_TOKENS` tokens with padding.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and sizes[i] * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    if answers is None or count_group_bytes(order, sizes, answers, config) <= GRAPH_BYTES:
        return batches
    found: list[list[int]] = []
    for batch in batches:
        found.append([])
        for i in batch:
            more = [*found[-1], i]
            if found[-1] and count_group_bytes(more, sizes, answers, config) > GRAPH_BYTES:
                found.append([])
            found[-1].append(i)
    return found


def count_group_bytes(
    group: Sequence[int], sizes: Sequence[int], answers: Sequence[int], config: Mapping[str, Any]
) -> int:
    """Estimate the bytes that some inputs keep for their backward pass.

    Args:
        group: The positions of the inputs.
        sizes: The number of tokens of each input; 1 for an image.
        answers: The number of tokens of each input's answers.
        config: The configuration of the model as plain values.

    Returns:
        The number of bytes.
    """
    patches, own = count_patches(config), sum(answers[i] for i in group)
    tokens = sum(sizes[i] if sizes[i] > 1 else patches for i in group)
    return count_graph_bytes(config, tokens + own, own)


def count_reading_bytes(config: Mapping[str, Any], model: int, width: int) -> int:
    """Estimate the bytes that a language model needs to score a full batch, beside its weights.

    They are the keys and values of a batch of prompts, the values of one layer, the logits, and two
    copies of the logits whose exponentials are summed.

    Args:
        config: The configuration of the model as plain values.
        model: The bytes of the model.
        width: The bytes of a number.

    Returns:
        The number of bytes.
    """
    hidden, words = _find(config, "hidden", 0), count_words(config)
    head = _find(config, "head", hidden // max(1, _find(config, "heads", 1)))
    by_layer = 2 * _find(config, "cached heads", 1) * head
    cached = BATCH_POSITIONS * _find(config, "layers", 1) * by_layer
    by_token = READ_HIDDEN * hidden + READ_INNER * _find(config, "inner", 4 * hidden)
    logits = count_logits_bytes(model, width * words)
    summed = 2 * WIDTH * min(SUM_ENTRIES, logits // width)
    gaps = int(CACHE_GAPS * cached)
    values = cached + gaps + BATCH_POSITIONS * by_token
    return width * values + logits + summed + OTHER_BYTES


def count_words(config: Mapping[str, Any]) -> int:
    """Count the words of a model's vocabulary.

    Args:
        config: The configuration of the model as plain values.

    Returns:
        The number; 0 if the configuration states none.
    """
    return _find(config, "words", 0)


def _find(config: Mapping[str, Any], what: str, default: int) -> int:
    """Find a size in a configuration, first in that of its text model."""
    parts = [config.get("text_config"), config, config.get("vision_config")]
    stated = (p.get(name) for p in parts if isinstance(p, Mapping) for name in NAMES[what])
    return next((n for n in stated if isinstance(n, int) and n > 0), default)


def count_logits_bytes(model: int, position: int) -> int:
    """Count the bytes that the logits of one forward pass without gradients may take.

    Args:
        model: The bytes of the model.
        position: The bytes of the logits at one position.

    Returns:
        The number of bytes.
    """
    return min(BATCH_POSITIONS * position, max(LOGITS_BYTES, model // LOGITS_SHARE))


def count_patches(config: Mapping[str, Any]) -> int:
    """Count the tokens of an image.

    Args:
        config: The configuration of the model as plain values.

    Returns:
        The number of patches, and one.
    """
    own = config.get("vision_config") or config
    side, patch = own.get("image_size", 224), own.get("patch_size", 16)
    whole = isinstance(side, int) and isinstance(patch, int) and patch > 0
    return (side // patch) ** 2 + 1 if whole else 1
