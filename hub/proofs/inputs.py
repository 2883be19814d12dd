"""Fixed inputs for any model, and the comparison of what two models compute from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from experthub.hub.errors import HubError
from torch import Tensor

SEED, ROWS, TOKENS = 20, 2, 12
SAMPLES = 8000  # Half a second of sound.


def make_inputs(model: Any, tokens: int) -> dict[str, Tensor]:
    """Make a fixed input that a model can read: tokens, pixels or sound.

    Args:
        model: A transformers model.
        tokens: The number of tokens to draw from; 0 for all tokens of the model.

    Returns:
        The arguments of its forward pass.

    Raises:
        HubError: The model reads another kind of input.
    """
    random = torch.Generator().manual_seed(SEED)
    config, names = model.config, set(inspect.signature(model.forward).parameters)
    main = model.main_input_name
    found: dict[str, Tensor] = {}
    if main == "input_ids":
        found["input_ids"] = _draw_tokens(config, tokens, random)
        if "pixel_values" in names and hasattr(model, "get_text_features"):
            found["pixel_values"] = _draw_pixels(config, random)
    elif main == "pixel_values":
        found["pixel_values"] = _draw_pixels(config, random)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        length = 2 * getattr(config, "max_source_positions", 50)
        found["input_features"] = torch.randn(ROWS, config.num_mel_bins, length, generator=random)
    elif main == "input_values":
        found["input_values"] = torch.randn(ROWS, SAMPLES, generator=random)
    else:
        raise HubError(
            f"a {type(model).__name__} reads {main}, for which no fixed input is known",
            "pass --no-proof",
        )
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = _draw_tokens(config, tokens, random)
    return {name: value.to(model.device) for name, value in found.items()}


def _draw_tokens(config: Any, tokens: int, random: torch.Generator) -> Tensor:
    """Draw tokens that stand for no image and no sound."""
    size = tokens or int(config.get_text_config().vocab_size)
    ids = torch.randint(0, size, (ROWS, TOKENS), generator=random)
    for key in ("image_token_id", "video_token_id", "audio_token_id", "image_token_index"):
        marker = getattr(config, key, None)
        if isinstance(marker, int):
            ids[ids == marker] = (marker + 1) % size
    return ids


def _draw_pixels(config: Any, random: torch.Generator) -> Tensor:
    """Draw images of the size that a model reads."""
    own = getattr(config, "vision_config", config)
    size = getattr(own, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(own, "num_channels", 3)
    return torch.randn(ROWS, channels, height, width, generator=random)


def compute_outputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a model on an input.

    Args:
        model: A transformers model, or one of peft.
        inputs: The arguments of its forward pass.

    Returns:
        Its outputs that are float tensors, by name: logits, hidden states, embeddings.
    """
    with torch.no_grad():
        found: Mapping[str, Any] = model.eval()(**inputs, return_dict=True)
    return {
        name: value.float()
        for name, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def compare_outputs(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Compare the outputs of two models on one input.

    Args:
        ours: The outputs of the first model.
        theirs: The outputs of the second model, with the same names.

    Returns:
        The largest difference, and the magnitude of the largest output.
    """
    names = ours.keys() & theirs.keys()
    if not names:
        return float("nan"), 0.0
    pairs = [(ours[name], theirs[name]) for name in sorted(names)]
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf"), 0.0
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    return difference, max(float(other.abs().max()) for _, other in pairs)
