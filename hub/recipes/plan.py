"""Plans: a recipe with every name looked up and every shape checked, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.files.digests import digest_of
from experthub.hub.recipes.examples import PlannedData
from experthub.hub.recipes.planned_experts import Member, PlannedExpert, count_virtual_tokens
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.vocabulary import Vocabulary
from experthub.hub.registry.content import Content

LOCK_VERSION = 2  # of the composition's digest and of lock files. Version 1 covered weights only.


@dataclass(frozen=True)
class Plan:
    """A resolved recipe: everything a composition will read and change.

    Attributes:
        recipe: The recipe.
        base: The base.
        experts: The experts of the recipe.
        parameters: The names of the parameters that the method changes.
        dtype: The dtype of the composed model.
        reads: Bytes of weights that will be read.
        memory: Bytes that composing and reading take at most, see `estimate_memory`.
        data: The data that the method learns from.
        found: The stored state of the method, if the recipe names one or a lock pins one.
        unused: The names of the base's stored weights that its model does not use.
        encoders: The bases that embed texts for the method, by their names in the recipe.
        parts: A plan for each part of a recipe with parts.
        dense: The names of the parameters that are taken from one expert as they are.
        vocabulary: The vocabulary, if experts have another one than the base.
    """

    recipe: Recipe
    base: Base
    experts: tuple[PlannedExpert, ...]
    parameters: tuple[str, ...]
    dtype: str
    reads: int
    memory: int
    data: PlannedData | None = None
    found: Content | None = None
    unused: tuple[str, ...] = ()
    encoders: Mapping[str, Base] = field(default_factory=dict)
    parts: tuple[Plan, ...] = ()
    dense: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None

    @property
    def units(self) -> tuple[Plan, ...]:
        """Plans of one method each: the parts, or the plan itself."""
        return self.parts or (self,)

    @property
    def completes_base(self) -> bool:
        """True if the experts bring along weights or tokens that the base lacks."""
        return bool(self.base.lacks) or self.vocabulary is not None

    @property
    def routed(self) -> bool:
        """True if some modules are routed while the model runs."""
        return any(unit.recipe.route is not None and not unit.folds for unit in self.units)

    @property
    def skilled(self) -> bool:
        """True if a route mixes the skills of an inventory."""
        return any("skills" in method.strategy.needs for method in self.recipe.methods)

    @property
    def virtual_tokens(self) -> int:
        """The number of tokens that soft prompts put before a text; 0 without them."""
        return count_virtual_tokens(self.experts, self.recipe.route is not None)

    @property
    def folds(self) -> bool:
        """True if the route uses one task only, so that it is composed as a plain LoRA."""
        known = len(self.members[0].skill_tasks) == 1
        return self.skilled and (known or self.task is not None)

    @property
    def task(self) -> str | None:
        """The one task that the recipe fixes for every input, if its method has such an option."""
        return self.recipe.method.task

    @property
    def members(self) -> list[Member]:
        """The stored experts, including the experts of nested merges."""
        return [member for expert in self.experts for member in expert.members]

    @property
    def adapted(self) -> set[str]:
        """The names of the parameters that a LoRA changes, by its factors or its dense parts."""
        low = {a.parameter for member in self.members for a in member.adapted}
        return low.union(*(member.footprint.dense for member in self.members))

    @property
    def separate(self) -> set[str]:
        """The names of the parameters that a LoRA changes in one module only."""
        low = {a.parameter for member in self.members for a in member.adapted}
        parts = [part for m in self.members for own in m.footprint.dense.values() for part in own]
        return low | {part.parameter for part in parts if part.way == "replace"}

    @property
    def takes_dense(self) -> bool:
        """True if dense parts are taken from one expert, and not combined by the method."""
        return self.recipe.route is not None or self.recipe.dense_parts is not None

    @property
    def dense_expert(self) -> PlannedExpert:
        """The expert whose dense parts are taken as they are."""
        named = self.recipe.dense_parts
        return next((e for e in self.experts if e.label == named), self.experts[0])

    @cached_property
    def contents(self) -> list[Any]:
        """Everything that decides the experts' weights."""
        return [expert.content for expert in self.experts]

    @property
    def digest(self) -> str:
        """The name of the composition by content: the same digest and code give the same bits."""
        digests = [encoder.digest for encoder in self.encoders.values()]
        more = {"encoders": digests} if digests else {}
        return self._compute_digest(LOCK_VERSION, self.base.digest, **more)

    @property
    def weights_digest(self) -> str:
        """The digest of version 1, which of the base covers the weights only, for old lock files."""
        return self._compute_digest(1, self.base.fingerprint)

    def _compute_digest(self, version: int, base: str, **more: Any) -> str:
        """Compute the digest of everything that is composed."""
        content = {
            **self._options,
            "version": version,
            "base": base,
            "experts": self.contents,
            **more,
        }
        if self.recipe.stored and self.found:
            content[self.recipe.state_key] = self.found.digest
        elif self.data:
            content["data"] = self.data.digest
        return digest_of(content)

    @property
    def layers(self) -> list[int]:
        """The layers that have something to change; -1 stands for modules outside of layers."""
        return sorted({find_layer(name) for name in self.parameters})

    @property
    def keeps_state(self) -> bool:
        """True if the method has a state that is worth keeping."""
        return any(method.strategy.keeps_state for method in self.recipe.methods)

    @property
    def _options(self) -> dict[str, Any]:
        """The keys of the recipe except base and experts."""
        return {
            **_record_methods(self.recipe),
            "targets": self.recipe.targets,
            "dtype": self.dtype,
            "seed": self.recipe.seed,
            "allow_base_mismatch": self.recipe.allow_base_mismatch,
            **({"dense_parts": self.recipe.dense_parts} if self.recipe.dense_parts else {}),
        }

    @property
    def lock(self) -> dict[str, Any]:
        """The content of a lock file: everything in the composition, by digest."""
        encoders = {name: _record_base(base) for name, base in self.encoders.items()}
        return {
            "version": LOCK_VERSION,
            "composition": self.digest,
            "base": _record_base(self.base),
            **({"encoders": encoders} if encoders else {}),
            "experts": [_record_expert(expert) for expert in self.experts],
            **self._options,
            **({"data": self.data.record()} if self.data else {}),
            **({self.recipe.state_key: _record_content(self.found)} if self.found else {}),
        }

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values, for `--json`.

        Returns:
            The lock, with the digest, the parameters and the sizes.
        """
        return {
            "digest": self.digest,
            **self.lock,
            "parameters": list(self.parameters),
            "reads_bytes": self.reads,
            "memory_bytes": self.memory,
            "unused_weights": list(self.unused),
        }


def _record_methods(recipe: Recipe) -> dict[str, Any]:
    """Return the method of a recipe, or the methods of its parts, as plain values."""
    if recipe.parts is None:
        return {recipe.method.kind: recipe.method.record()}
    parts = [{"targets": p.targets, p.method.kind: p.method.record()} for p in recipe.parts]
    return {"parts": parts}


def find_layer(name: str) -> int:
    """Find the layer of a module by the first number in its path.

    Args:
        name: The path of the module.

    Returns:
        The number; -1 for a module outside of the layers.
    """
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else -1


def _record_base(base: Base) -> dict[str, Any]:
    """Return the entry of a lock for a base."""
    return {
        "name": base.name,
        "fingerprint": base.fingerprint,
        "digest": base.digest,
        "sources": list(base.sources),
        "sha256": base.sha256,
        "commit": base.commit,
    }


def _record_content(content: Content) -> dict[str, Any]:
    """Return the entry of a lock for one content."""
    return {
        "expert": content.reference,
        "digest": content.digest,
        "sources": list(content.sources),
    }


def _record_expert(expert: PlannedExpert) -> dict[str, Any]:
    """Return the entry of a lock for one expert."""
    members = [
        _record_content(m.content) | ({"task": m.task} if m.task else {}) for m in expert.members
    ]
    if expert.merge is None:
        return {**members[0], "as": expert.label, "weight": expert.weight}
    inner = [m | {"weight": x.weight} for m, x in zip(members, expert.members, strict=True)]
    return {
        "merge": expert.merge.record(),
        "experts": inner,
        "rank": expert.rank,
        "as": expert.label,
        "weight": expert.weight,
    }
