"""A trace by layer: how much each expert gets, and how undecided the tokens are.

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
    """One layer, mean over its modules.

    weights: each expert's, mean over the tokens.  entropy: of a token's weights, mean over the
    tokens, in bits; 0 where every token takes one expert.  usage_entropy: of the tokens' mean weights,
    in bits; what it has more depends on the token.  most: the largest entropy there can be,
    log2 of the number of experts.
    """

    layer: int
    modules: int
    weights: tuple[float, ...]
    entropy: float
    usage_entropy: float
    most: float

    def record(self) -> dict[str, Any]:
        values = asdict(self) | {"weights": list(self.weights)}
        values.pop("most")
        for name in ("entropy", "usage_entropy"):
            values[f"{name}_normalised"] = self.share(values[name])
        return values

    def share(self, entropy: float) -> float:
        """An entropy divided by the largest there can be, 0 to 1."""
        return entropy / self.most if self.most else 0.0


def summed_up(layers: Sequence[int], weights_MTE: Tensor) -> list[LayerSummary]:
    """Weights by layer, of which `layers` has the number for each module."""
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
                float(entropy_bits(own_mTE).mean()),
                float(entropy_bits(mean_mE).mean()),
                most,
            )
        )
    return found


def entropy_bits(weights: Tensor) -> Tensor:
    """The entropy in bits of weights `[..., E]`, as shares of their sum; 0 where all are zero."""
    shares = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    bits: Tensor = torch.special.entr(shares).sum(-1) / math.log(2)
    return bits
