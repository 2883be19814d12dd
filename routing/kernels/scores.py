"""Scores: the products of inputs with a router's probes.

Shapes: T tokens, I inputs of a module, P probes.
"""

from __future__ import annotations

import torch
from experthub.routing._router import LAYER_NORM_EPS
from torch import Tensor, nn


def normalise_inputs(x_TI: Tensor, layer_norm: bool) -> Tensor:
    """Return the inputs as probes read them.

    Args:
        x_TI: Inputs `[T, I]` of any float dtype.
        layer_norm: Whether to standardise each input.

    Returns:
        The inputs `[T, I]` in float32.
    """
    wide = x_TI.float()
    return (
        nn.functional.layer_norm(wide, wide.shape[1:], eps=LAYER_NORM_EPS) if layer_norm else wide
    )


def compute_scores(x_TI: Tensor, probes_PI: Tensor | None, layer_norm: bool) -> Tensor:
    """Multiply inputs with probes.

    Args:
        x_TI: Inputs `[T, I]` of any float dtype.
        probes_PI: Probes `[P, I]` in float32; None for a router that does not look at the input.
        layer_norm: Whether the probes read standardised inputs.

    Returns:
        Scores `[T, P]` in float32; `[T, 0]` without probes.
    """
    if probes_PI is None:
        return x_TI.new_empty((len(x_TI), 0), dtype=torch.float32)
    return torch.mm(normalise_inputs(x_TI, layer_norm), probes_PI.T)


def compute_inverse_deviation(x_TI: Tensor) -> Tensor:
    """Compute `1 / sqrt(var(x) + eps)` of each input, the factor of LayerNorm.

    Args:
        x_TI: Inputs `[T, I]`.

    Returns:
        The factors `[T]`.
    """
    # Torch vectorises a norm on CPUs, but not a variance.
    norm_T: Tensor = torch.linalg.vector_norm(x_TI - x_TI.mean(-1, keepdim=True), dim=-1)
    return (norm_T.square() / x_TI.shape[1] + LAYER_NORM_EPS).rsqrt()
