"""The embeddings of a composition whose experts add tokens to the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.tying import untie
from experthub.hub.bases.vocabulary import resize_model
from experthub.hub.kinds.dense_changes import fit_rows
from experthub.hub.recipes.vocabulary import Vocabulary
from experthub.merge import Delta, Dense, LowRank, find_uses
from torch import Tensor, nn

# Parameter -> function that returns an expert's dense change of it.
DenseChanges = Mapping[str, Callable[[], Delta]]


@dataclass
class Embeddings:
    """The rows of tokens in a composition, and the changes of experts by these rows.

    A new row of the completed base is the mean of the experts that have the token. So an expert that
    lacks it does not change it.

    Args:
        base: The base.
        vocabulary: The vocabulary of the composition.
        load: A function that returns the dense changes of an expert, by its digest; None for an expert
            that is not composed.
        separate: The parameters that an expert changes in one module only.
    """

    base: Base
    vocabulary: Vocabulary
    load: Callable[[str], DenseChanges | None]
    separate: Set[str] = frozenset()
    _references: dict[str, Tensor] = field(default_factory=dict)

    def reference(self, name: str) -> Tensor:
        """Return a parameter of the completed base.

        Args:
            name: The name of a parameter whose rows are tokens.

        Returns:
            The base's rows, and the mean of the experts' rows for each new token, in float32.
        """
        name = self.base.tied.get(name, name)
        if name not in self._references:
            own = self.base.read_weight(name).float()
            found = fit_rows(own, (self.vocabulary.rows, *own.shape[1:])).clone()
            new = self.vocabulary.new
            found[new] = 0
            given: dict[int, list[Tensor]] = {}
            plain: dict[int, list[Tensor]] = {}
            for digest, places in self.vocabulary.sources.items():
                changes = self.load(digest)
                if changes is None:
                    continue
                value = own
                if name in changes:
                    change = changes[name]().dense()
                    value = fit_rows(own, tuple(change.shape)) + change
                for row in places.keys() & set(new):
                    if 0 <= places[row] < len(value):
                        kept = given if name in changes else plain
                        kept.setdefault(row, []).append(value[places[row]])
            for row in new:
                if rows := given.get(row) or plain.get(row):
                    found[row] = torch.stack(rows).mean(0)
            self._references[name] = found
        return self._references[name]

    def align(self, digest: str, changes: DenseChanges) -> dict[str, Callable[[], Delta]]:
        """Return the changes of an expert by the rows of the composition.

        Args:
            digest: The expert.
            changes: Its changes, by its own rows.

        Returns:
            The changes; those of other parameters as they are.
        """
        return {
            name: partial(self._align, name, digest, change)
            if name in self.vocabulary.parameters
            else change
            for name, change in changes.items()
        }

    def _align(self, name: str, digest: str, load: Callable[[], Delta]) -> Delta:
        """Move the rows of one change."""
        change, places = load(), self.vocabulary.sources.get(digest, {})
        count = min(change.shape[0], self.vocabulary.own)
        index = torch.full((self.vocabulary.rows,), -1)
        index[:count] = torch.arange(count)
        index[self.vocabulary.new] = -1
        index[list(places)] = torch.tensor(list(places.values()), dtype=index.dtype)
        index[index >= change.shape[0]] = -1
        here = index >= 0
        if isinstance(change, LowRank):
            b = change.b.new_zeros(self.vocabulary.rows, change.rank)
            b[here] = change.b[index[here]]
            return LowRank(change.a, b, change.scale)
        found = change.d.new_zeros(self.vocabulary.rows, *change.shape[1:])
        found[here] = change.d[index[here]]
        moved = [row for row in places if index[row] >= 0]
        own = fit_rows(self.base.read_weight(name).float(), change.shape)
        found[moved] += own[index[moved]] - self.reference(name)[moved]
        return Dense(found)

    def complete(self, model: Any) -> None:
        """Give a model the rows of the completed base.

        Args:
            model: The base's model, which is changed in place.
        """
        names = {n for n in self.vocabulary.parameters if n not in self.base.tied}
        for name, uses in find_uses(model, names).items():
            # Transformers resizes tensors in place, and those of a base may be shared.
            value = nn.Parameter(model.get_parameter(name).detach().clone(), requires_grad=False)
            for module, leaf in uses:
                module.register_parameter(leaf, value)
        if self.vocabulary.rows != self.vocabulary.own:
            resize_model(model, self.vocabulary.rows)
        new = self.vocabulary.new
        with torch.no_grad():
            for name in names:
                value = model.get_parameter(name)
                value[new] = self.reference(name)[new].to(value)
            for output, stored in self.base.tied.items():
                if stored in names and self._keeps_output(output, stored):
                    self._restore_output(model, stored)

    def _keeps_output(self, output: str, stored: str) -> bool:
        """Tell whether experts change the input embedding, and none the output tied to it."""
        changed = [self.load(digest) or {} for digest in self.vocabulary.sources]
        return stored in self.separate and not any(output in changes for changes in changed)

    def _restore_output(self, model: Any, stored: str) -> None:
        """Untie the output embedding, and give it the base's own rows where the base has some."""
        untie(model, {stored}, {stored})
        value = model.get_output_embeddings().weight
        rows = [row for row in self.vocabulary.new if row < self.vocabulary.own]
        value[rows] = self.base.read_weight(stored)[rows].to(value)
