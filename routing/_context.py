"""The rows that a composed model reads, and the weights that were chosen for whole rows.

Shapes: B rows of S tokens each, which a module reads as T = B S inputs; G modules that share their
input, P probes, E experts of the recipe, L layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from experthub.routing._router import Weights
from torch import Tensor

VALUES, EXPERTS = "values", "experts"  # Keys of `Context.kept`.


@dataclass(eq=False)
class Context:
    """The rows that a composed model reads at this moment, shared by all of its routed modules.

    Args:
        rows: The number of rows B; None outside of the model's forward pass.
        tokens: The number of tokens S of each row.
        real: Which tokens `[B, S]` are not padding; None means all.
        kept: Decisions about every row `[B, ...]`. They are made when the first tokens of the rows
            are read, and are used for all following tokens.
        off: Whether the model computes as its base, without any expert.
    """

    rows: int | None = None
    tokens: int = 0
    real: Tensor | None = None
    kept: dict[Hashable, Tensor] = field(default_factory=dict)
    off: bool = False

    def select(self, weights: Weights) -> None:
        """Set the weights that `ModelRouter` returns for every row.

        Args:
            weights: Weights of the recipe's experts, as a `Select` function returns them.
        """
        self.kept[VALUES] = weights.values
        if weights.experts is not None:
            self.kept[EXPERTS] = weights.experts

    def infer_shape(self, leading: Sequence[int]) -> tuple[int, int]:
        """Infer the number of rows and the tokens per row of a module's inputs.

        Args:
            leading: The leading dimensions of the inputs `[*leading, I]`.

        Returns:
            B and S; S is 1 if the module reads one token of each row.

        Raises:
            ValueError: The inputs are not those of the current batch.
        """
        count = torch.Size(leading).numel()
        rows = self.rows or (leading[0] if len(leading) > 1 else count)
        tokens = count // max(rows, 1)
        known = not self.rows or not self.tokens or tokens in (1, self.tokens)
        if rows * tokens != count or not known:
            raise ValueError(
                f"expected the inputs of {rows} rows of {self.tokens} tokens, found {count} inputs"
            )
        return rows, tokens

    def pool_scores(self, key: Hashable, scores: Tensor, leading: Sequence[int]) -> Tensor:
        """Average scores over the tokens of each row, without padding.

        Within the model's forward pass the result is kept, and later calls with the key return it.

        Args:
            key: Identifies the module whose scores these are.
            scores: The scores `[T, G, P]` of the inputs.
            leading: The leading dimensions of the inputs.

        Returns:
            Mean scores `[B, G, P]`.

        Raises:
            ValueError: The inputs are not those of the current batch.
        """
        rows, tokens = self.infer_shape(leading)
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
        kept = self.context.kept
        if VALUES not in kept:
            raise ValueError(
                "expected weights of the current batch, found none: run the whole composed model, "
                "because its router decides once for the model"
            )
        found = Weights(kept[VALUES], kept.get(EXPERTS))
        if len(self.experts) < self.n_experts:
            found = Weights(found.dense(self.n_experts)[..., list(self.experts)])
        if found.values.ndim == 1:
            return found
        rows, tokens = self.context.infer_shape([len(scores)])
        if self.layer is None:
            return found.add_module_axis().repeat_rows(tokens)
        shared = found.values.shape[2] == 1  # All layers use the same weights.
        values = found.values[:, :, 0 if shared else self.layer].flatten(0, 1)
        if len(values) != len(scores):
            raise ValueError(
                f"expected all {self.context.tokens} tokens of {rows} rows, "
                f"found {len(scores)} inputs"
            )
        return Weights(values).add_module_axis()
