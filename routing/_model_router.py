"""The router of a module if one router decides for the whole model.

Shapes: B rows of S tokens each, which a module reads as T inputs; G modules that share their input, I
inputs of a module, P probes, E experts of the recipe, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from experthub.routing._context import EXPERTS, VALUES, Context
from experthub.routing._router import Weights
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ModelRouter:
    """The router of a module if one router decides for the whole model, before the model runs.

    Args:
        context: Holds the weights of every row.
        experts: The positions in the recipe of the experts that adapt the module.
        n_experts: The number of experts of the recipe.
        layer: The position of the module's layer among the weights; None if all layers share them.
        probes_PI: None, because the module's input is not looked at.
        layer_norm: Not used without probes.
        pooled: Not used without probes.
    """

    context: Context
    experts: tuple[int, ...]
    n_experts: int
    layer: int | None = None
    probes_PI: None = None
    layer_norm: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        """Return the weights that were chosen for the row of each input.

        Args:
            scores: Scores `[T, G, 0]`; only their number is used.

        Returns:
            Weights `[T, 1, E]` or `[T, 1, k]`; `[E]` if all rows have the same weights.

        Raises:
            ValueError: No weights were chosen, because the composed model is not running, or the
                inputs are not those of the current batch.
        """
        return self.find([len(scores)])

    def find(self, leading: Sequence[int]) -> Weights:
        """Return the weights that were chosen for the row of each input.

        Args:
            leading: The leading dimensions of the inputs `[*leading, I]`.

        Returns:
            Weights, as `weights` returns them.

        Raises:
            ValueError: As in `weights`.
        """
        now, route = self.context.current, self.context.route
        if (route, VALUES) not in now.kept:
            raise ValueError(
                "expected weights of the current batch, found none: run the whole composed model, "
                "because its router decides once for the model"
            )
        found = Weights(now.kept[route, VALUES], now.kept.get((route, EXPERTS)))
        if len(self.experts) < self.n_experts:
            found = Weights(found.dense(self.n_experts)[..., list(self.experts)])
        if found.values.ndim == 1:
            return found
        rows, tokens = now.infer_shape(leading)
        if self.layer is None:
            return found.add_module_axis().repeat_rows(tokens)
        past = [one[..., list(self.experts)] for one in now.past.get(route, ())]
        values_BTLE = _align(past, found.values, tokens)
        if values_BTLE.shape[:2] != (rows, tokens):
            raise ValueError(
                f"expected all {now.tokens} tokens of {rows} rows, found inputs of the shape "
                f"{list(leading)}"
            )
        shared = values_BTLE.shape[2] == 1  # All layers use the same weights.
        values = values_BTLE[:, :, 0 if shared else self.layer].flatten(0, 1)
        return Weights(values).add_module_axis()


def _align(past: Sequence[Tensor], new_BSLE: Tensor, tokens: int) -> Tensor:
    """Return the weights `[B, T, L, E]` of the tokens in a cache; zero where it is not filled yet."""
    if tokens <= new_BSLE.shape[1]:
        return new_BSLE
    whole = torch.cat([*past, new_BSLE], 1)
    if whole.shape[1] >= tokens:  # The cache may have dropped its first tokens.
        return whole[:, -tokens:]
    return nn.functional.pad(whole, (0, 0, 0, 0, 0, tokens - whole.shape[1]))
