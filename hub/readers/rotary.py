"""Rotary positions that depend on the length of the longest text in a batch."""

from __future__ import annotations

from typing import Any

# Beyond its limit, a model of these kinds turns all positions of a batch by other angles.
BY_LENGTH = ("dynamic", "longrope")


def find_rotary_limit(config: Any) -> int | None:
    """Find the length up to which the rotary positions of a text do not depend on its batch.

    Transformers chooses the angles by the largest position in a batch, padding included. So beyond
    this length, only texts of the same length may share a batch, and no text may continue a cache.

    Args:
        config: The configuration of the model.

    Returns:
        The number of tokens; None if the angles never depend on it.
    """
    text = config.get_text_config()
    stated = getattr(text, "rope_parameters", None) or {}
    # Models with several kinds of layers have one mapping for each of them.
    found = [stated, *stated.values()] if isinstance(stated, dict) else []
    limits = []
    for one in found:
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind in BY_LENGTH:
            original = one.get("original_max_position_embeddings") if kind == "longrope" else None
            limits.append(int(original or text.max_position_embeddings))
    return min(limits, default=None)
