"""The rows that a composed model reads, and the weights that were chosen for whole rows.

Shapes: B rows of S tokens each, which a module reads as T = B S inputs; G modules that share their
input, P probes, E experts of the recipe, L layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from experthub.routing._router import Weights
from torch import Tensor

# The name of a route, and what was decided: by a group of modules, or for the whole model.
RowKey = tuple[str, Hashable]
VALUES, EXPERTS = "values", "experts"  # Keys of the decisions of a router of the whole model.


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of a composed model: the rows that it reads, and the decisions about them.

    Args:
        rows: The number of rows B; None if it is unknown.
        tokens: The number of tokens S of each row.
        real: Which tokens `[B, S]` are not padding; None means all.
        kept: Decisions about every row `[B, ...]`. They are made when the first tokens of the rows
            are read, and are used for all following tokens.
        off: Whether the model computes as its base, without any expert.
        past: Weights of earlier tokens `[B, S, L, E]` by route, in their order. Some models expand
            their whole cache in every forward pass.
        base: The key/value cache of the base alone, for routers that read its hidden states.
        outer: The forward pass of the same model inside which this one runs.
        module: The module whose call it is. Calls of modules inside that one belong to it.
    """

    rows: int | None = None
    tokens: int = 0
    real: Tensor | None = None
    kept: dict[RowKey, Tensor] = field(default_factory=dict)
    past: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    off: bool = False
    base: Any = None
    outer: ForwardPass | None = None
    module: Any = None

    def infer_shape(self, leading: Sequence[int]) -> tuple[int, int]:
        """Infer the number of rows and the tokens per row of a module's inputs.

        Args:
            leading: The leading dimensions of the inputs `[*leading, I]`.

        Returns:
            B and S; S is 1 if the module reads one token of each row.

        Raises:
            ValueError: The inputs are not those of the current batch.
        """
        size = torch.Size(leading).numel()
        rows = self.rows or (leading[0] if len(leading) > 1 else size)
        tokens = size // max(rows, 1)
        # Without a dimension of rows, or with one that splits rows, only their number tells.
        split = len(leading) < 2 or (not self.tokens and leading[0] % max(rows, 1) == 0)
        known = not self.rows or leading[0] == rows or (split and tokens in (1, self.tokens))
        known = known or (split and not self.tokens)
        if rows * tokens != size or not known:
            raise ValueError(
                f"expected the inputs of {rows} rows of {self.tokens} tokens, found inputs of the "
                f"shape {list(leading)}"
            )
        return rows, tokens

    def pool_scores(self, key: RowKey, scores: Tensor, leading: Sequence[int]) -> Tensor:
        """Average scores over the tokens of each row, without padding.

        Within the model's forward pass the result is kept, and later calls with the key return it.

        Args:
            key: The name of the route, and the module whose scores these are.
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
        if self.tokens and tokens > self.tokens:  # A whole cache of a fixed size.
            by_row = by_row[:, : self.tokens]
        if self.real is None or tokens == 1:
            found = by_row.mean(1)
        else:
            real = self.real[:, :, None, None].to(scores.dtype)
            found = (by_row * real).sum(1) / real.sum(1).clamp(min=1)
        if self.rows is not None:
            self.kept[key] = found
        return found


class ForwardPasses:
    """The forward passes of one composed model; each thread sees its own alone.

    A model is shared by threads, so what is known about a forward pass is not stored on the model. A
    forward pass never leaves its thread, and torch.compile can trace thread-local data.

    Attributes:
        announced: Whether hooks of the model begin and end every forward pass. A model without such
            hooks has routers that need nothing but the input of their module.
    """

    def __init__(self) -> None:
        self.announced = False
        self._thread = local()

    def __getstate__(self) -> dict[str, bool]:
        """Return what a copy gets: no forward pass that runs."""
        return {"announced": self.announced}

    def __setstate__(self, state: dict[str, bool]) -> None:
        self.announced, self._thread = state["announced"], local()

    def begin(self, module: Any = None) -> ForwardPass:
        """Begin a forward pass in this thread.

        Args:
            module: The module whose call it is.

        Returns:
            The forward pass, which is the current one until it ends.
        """
        begun = ForwardPass(outer=self.find(), module=module)
        self._thread.current = begun
        return begun

    def end(self, ended: ForwardPass) -> None:
        """End a forward pass of this thread.

        Args:
            ended: The forward pass, which is the current one.
        """
        self._thread.current = ended.outer

    def find(self) -> ForwardPass | None:
        """Find the forward pass that runs in this thread.

        Returns:
            The innermost one; None if the model does not run.
        """
        found: ForwardPass | None = getattr(self._thread, "current", None)
        return found


class Context:
    """The link between the routed modules of one route and the forward pass that runs.

    Attributes:
        passes: The forward passes of the composed model.
        route: The name of the route among those of the model.
    """

    def __init__(
        self,
        passes: ForwardPasses | None = None,
        route: str = "",
        *,
        rows: int | None = None,
        tokens: int = 0,
    ) -> None:
        """Link a route to a model.

        Args:
            passes: The forward passes of the model; None for modules that are used without a model.
            route: The name of the route.
            rows: The number of rows that modules without a model read; None if it is unknown.
            tokens: The number of tokens of each of these rows.
        """
        self.passes, self.route = passes or ForwardPasses(), route
        self._alone = ForwardPass(rows, tokens)
        self._n_groups = 0

    def name_group(self) -> RowKey:
        """Name one more group of modules of the route, equally whenever the recipe is composed.

        Returns:
            The name of the route, and the number of the group.
        """
        self._n_groups += 1
        return self.route, self._n_groups

    @property
    def off(self) -> bool:
        """True if the model computes as its base, without any expert."""
        found = self.passes.find()
        return found is not None and found.off

    @property
    def current(self) -> ForwardPass:
        """The forward pass that runs in this thread.

        Raises:
            ValueError: The model does not run in this thread.
        """
        if not self.passes.announced:
            return self._alone
        found = self.passes.find()
        if found is None:
            raise ValueError(
                "expected a module inside a forward pass of the composed model, found it called "
                "alone: run the whole model, without gradient checkpointing, because its router "
                "decides for whole rows"
            )
        return found

    def select(self, weights: Weights) -> None:
        """Set the weights that `ModelRouter` returns for every row.

        Args:
            weights: Weights of the recipe's experts, as a `Select` function returns them.
        """
        kept = self.current.kept
        kept[self.route, VALUES] = weights.values
        if weights.experts is not None:
            kept[self.route, EXPERTS] = weights.experts
