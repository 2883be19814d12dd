"""Summaries of a trace by layer: the mean weight of each expert, and the entropies of the weights.

Shapes: M modules, T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSummary:
    """A summary of one layer; all values are means over its modules.

    Args:
        layer: The number of the layer, or -1 for modules outside of the layers.
        modules: The number of its routed modules.
        weights: The mean weight of each expert over the tokens.
        entropy: The mean entropy of one token's weights, in bits; 0 if every token takes one expert.
        usage_entropy: The entropy of the tokens' mean weights, in bits. It is at least `entropy`;
            the difference is the part that depends on the token.
        most: The largest possible entropy: log2 of the number of experts, in bits.
    """

    layer: int
    modules: int
    weights: tuple[float, ...]
    entropy: float
    usage_entropy: float
    most: float

    def record(self) -> dict[str, Any]:
        """Return the summary as plain values, with the entropies also as shares of the largest.

        Returns:
            The fields by name, and `entropy_normalised` and `usage_entropy_normalised`.
        """
        values = asdict(self) | {"weights": list(self.weights)}
        values.pop("most")
        for name in ("entropy", "usage_entropy"):
            values[f"{name}_normalised"] = self.normalise(values[name])
        return values

    def normalise(self, entropy: float) -> float:
        """Divide an entropy by the largest possible one.

        Args:
            entropy: The entropy in bits.

        Returns:
            The share, from 0 to 1; 0 for a single expert.
        """
        return entropy / self.most if self.most else 0.0


def summarise_layers(layers: Sequence[int], weights_MTE: Tensor) -> list[LayerSummary]:
    """Summarise weights by layer.

    Args:
        layers: The number of the layer of each module.
        weights_MTE: The weights.

    Returns:
        The summaries, sorted by layer.
    """
    most = math.log2(weights_MTE.shape[-1])
    found = []
    for layer in sorted(set(layers)):
        own_mTE = weights_MTE[[m for m, number in enumerate(layers) if number == layer]].double()
        mean_mE = own_mTE.mean(1)
        found.append(
            LayerSummary(
                layer,
                len(own_mTE),
                tuple(mean_mE.mean(0).tolist()),
                float(compute_entropy(own_mTE).mean()),
                float(compute_entropy(mean_mE).mean()),
                most,
            )
        )
    return found


def compute_entropy(weights: Tensor) -> Tensor:
    """Compute the entropy of weights, normalised by the sum of their absolute values.

    Args:
        weights: The weights `[..., E]`.

    Returns:
        The entropies `[...]` in bits; 0 where all weights are zero.
    """
    shares = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    bits: Tensor = torch.special.entr(shares).sum(-1) / math.log(2)
    return bits
