"""What routers know of a batch besides the input of a module.

Shapes: B rows of S tokens each, which a module reads as T = B S inputs; G modules, P probes,
E experts of the recipe.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from experthub.routing._router import Weights
from torch import Tensor

VALUES, EXPERTS = "values", "experts"


@dataclass(eq=False)
class Context:
    """The rows that a composed model reads at this moment; one for all of its routed modules.

    rows: their number, None outside of the model's forward pass.  tokens: of each row.  real:
    `[B, S]`, which of them are no padding; None for all.  kept: what was found out about every row
    when its first tokens were read, `[B, ...]`: it holds for those that follow.  off:
    the model reads as its base, without any expert.
    """

    rows: int | None = None
    tokens: int = 0
    real: Tensor | None = None
    kept: dict[Hashable, Tensor] = field(default_factory=dict)
    off: bool = False

    def select(self, weights: Weights) -> None:
        """Set what `Selected` gives to every row: weights of the recipe's experts."""
        self.kept[VALUES] = weights.values
        if weights.experts is not None:
            self.kept[EXPERTS] = weights.experts

    def shape(self, leading: Sequence[int]) -> tuple[int, int]:
        """B and S of a module's inputs `[*leading, I]`; ValueError where they are not the batch's."""
        count = torch.Size(leading).numel()
        rows = self.rows or (leading[0] if len(leading) > 1 else count)
        tokens = count // max(rows, 1)
        known = not self.rows or not self.tokens or tokens in (1, self.tokens)
        if rows * tokens != count or not known:
            raise ValueError(
                f"expected inputs of {rows} rows of {self.tokens}, found {count} inputs"
            )
        return rows, tokens

    def pooled(self, key: Hashable, scores: Tensor, leading: Sequence[int]) -> Tensor:
        """The mean of scores `[T, G, P]` over the real tokens of each row, `[B, G, P]`."""
        rows, tokens = self.shape(leading)
        if key in self.kept:
            return self.kept[key]
        by_row = scores.view(rows, tokens, *scores.shape[1:])
        if self.real is None or tokens == 1:
            found = by_row.mean(1)
        else:
            real = self.real[:, :, None, None].to(scores.dtype)
            found = (by_row * real).sum(1) / real.sum(1).clamp(min=1)
        if self.rows is not None:
            self.kept[key] = found
        return found


@dataclass(frozen=True, eq=False)
class Selected:
    """The router of a module whose experts were chosen for whole rows, before the model ran.

    experts: the places in the recipe of those that adapt the module, of `n_experts`.  layer: which
    of the chosen weights are the module's, where layers have their own.
    """

    context: Context
    experts: tuple[int, ...]
    n_experts: int
    layer: int | None = None
    probes_PI: None = None
    layer_norm: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        """scores: `[T, G, 0]`.  Raises ValueError outside of the composed model's forward pass."""
        kept = self.context.kept
        if VALUES not in kept:
            raise ValueError("this router chooses for whole examples: run the composed model")
        found = Weights(kept[VALUES], kept.get(EXPERTS))
        if len(self.experts) < self.n_experts:
            found = Weights(found.dense(self.n_experts)[..., list(self.experts)])
        if found.values.ndim == 1:
            return found
        rows, tokens = self.context.shape([len(scores)])
        if self.layer is None:
            return found.of_modules().repeated(tokens)
        shared = found.values.shape[2] == 1  # layers that have no weights of their own
        values = found.values[:, :, 0 if shared else self.layer].flatten(0, 1)
        if len(values) != len(scores):
            raise ValueError(f"expected all {self.context.tokens} tokens of {rows} rows")
        return Weights(values).of_modules()
