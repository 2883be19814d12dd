"""The memory that a composition takes: its weights, the logits of a batch, and learning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experthub.hub.bases.base import Base
from experthub.hub.files.json_files import read_json
from experthub.hub.readers.graph_memory import (
    OTHER_BYTES,
    count_group_bytes,
    count_reading_bytes,
    group_rows,
)
from experthub.hub.recipes.examples import PlannedData, choose_examples
from experthub.hub.recipes.planned_experts import LARGE, PlannedExpert
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.token_counts import count_tokens

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}
WIDTH |= {"F8_E4M3": 1, "F8_E5M2": 1}


def estimate_memory(
    recipes: Sequence[Recipe],
    base: Base,
    experts: Sequence[PlannedExpert],
    places: Sequence[tuple[Sequence[str], Sequence[str]]],
    dtype: str,
    data: PlannedData | None,
) -> int:
    """Estimate the largest memory that composing a recipe and reading with its model takes.

    Args:
        recipes: The recipe, or one for each of its parts.
        base: The base.
        experts: The experts.
        places: The names of the parameters that each of the recipes changes by its method, and of
            those with dense parts that are taken from one expert.
        dtype: The dtype of the composed model.
        data: The data that the method still learns from.

    Returns:
        The number of bytes, without the programs themselves.
    """
    width = WIDTH[dtype]
    own = sum(member.size for expert in experts for member in expert.members)
    weights = _count_weights(base, width)
    pairs = zip(recipes, places, strict=True)
    changed = [n for one, (own, rest) in pairs for n in (*(own if one.merge else ()), *rest)]
    # The files of the experts stay mapped. A route packs them beside that, unless a bank holds them.
    routed = own if any(one.route for one in recipes) and own < LARGE else 0
    # The merged weights lie beside those of the base, from which they are made.
    merged = width * sum(math.prod(base.shapes[name]) for name in changed if name in base.shapes)
    using = weights + merged + own + routed + _count_reading(base, weights, width)
    learns = any(one.method.strategy.needs_data for one in recipes)
    if data is None or not learns:
        return using
    sizes = [one.method.inputs_per_step for one in recipes]
    kept = _count_graph(base, data, next((size for size in sizes if size), None))
    learning = _count_weights(base, 4) + 2 * own + kept + OTHER_BYTES
    return max(using, learning)


def _count_weights(base: Base, width: int) -> int:
    """Count the bytes of the loaded base, whose entries take `width` bytes unless they stay packed."""
    if base.quantisation is None:
        return base.tensor_bytes * width // WIDTH.get(base.dtype, 4)
    if not base.quantisation.dequantised:
        return base.tensor_bytes
    return width * sum(math.prod(s) for name, s in base.shapes.items() if name not in base.tied)


def _count_reading(base: Base, weights: int, width: int) -> int:
    """Count the bytes that scoring a batch takes beside the weights, for a language model."""
    if not base.is_causal:
        return 0
    return count_reading_bytes(read_json(base.folder / "config.json"), weights, width)


def _count_graph(base: Base, data: PlannedData, batch_size: int | None) -> int:
    """Count the bytes that a step of learning keeps for its backward pass at once, at most."""
    config = read_json(base.folder / "config.json")
    reads_choices = base.is_causal or bool(config.get("is_encoder_decoder"))
    sees = not base.is_causal and ("vision_config" in config or "image_size" in config)
    sizes: list[int] = []
    answers: list[int] = []
    for one in choose_examples(data.use):
        texts = [one.task.format_prompt(e) if reads_choices else e.input for e in one.examples]
        read = [1] * len(texts) if sees else count_tokens(base.folder, texts)
        choices = [one.task.list_choices(e) if reads_choices else () for e in one.examples]
        spoken = iter(count_tokens(base.folder, [text for own in choices for text in own]))
        own = [sum(next(spoken) for _ in texts) for texts in choices]
        largest = sorted(zip(read, own, strict=True), reverse=True)[:batch_size]
        sizes += [size for size, _ in largest]
        answers += [count for _, count in largest]
    groups = group_rows(sizes, answers, config)
    return max(count_group_bytes(group, sizes, answers, config) for group in groups)
