"""The memory that reading takes, by which batches are made and plans are stated.

With gradients, a forward pass keeps values for the backward pass. Batches that would keep more
than `GRAPH_BYTES` together keep nothing instead, and run a second time in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GRAPH_BYTES = 1 << 29
LOGITS_BYTES = 1 << 25  # The logits of one forward pass, or a share of the model if that is more.
LOGITS_SHARE = 16
BATCH_POSITIONS = 2048  # The largest number of positions with logits in one forward pass.
CACHED_POSITIONS = 4 * BATCH_POSITIONS  # The largest number of cached tokens that choices follow.
SUM_ENTRIES = 1 << 20  # The largest number of logits of which exponentials are summed at once.
WIDTH = 4  # Bytes of a float32 number; gradients in half precision lose too much.
# Numbers that a layer keeps for each token, in hidden sizes and in sizes of its inner layer, and
# copies of each logit: itself, its gradient, and the two parts of the gradient.
PER_HIDDEN, PER_INNER, PER_LOGIT = 8, 4, 3
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
