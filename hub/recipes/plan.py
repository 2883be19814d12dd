"""Plans: a recipe with every name looked up and every shape checked, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.files.digests import digest_of
from experthub.hub.formats.adapter import Adapted
from experthub.hub.kinds import Footprint, kinds
from experthub.hub.recipes.examples import PlannedData
from experthub.hub.recipes.method import Method
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.registry.content import Content

LARGE = 100_000_000  # bytes of experts, from which on mapping a bank is faster than stacking them


@dataclass(frozen=True)
class Member:
    """One stored expert of a plan: its content, its kind, and what it changes of the base.

    weight: its factor within its expert.  size: bytes of its files.
    """

    content: Content
    kind: str
    weight: float
    size: int
    footprint: Footprint

    @property
    def reference(self) -> str:
        return self.content.reference

    @property
    def digest(self) -> str:
        return self.content.digest

    @property
    def task(self) -> str | None:
        return self.content.task

    @property
    def changes(self) -> dict[str, tuple[int, ...]]:
        return self.footprint.shapes

    @property
    def adapted(self) -> tuple[Adapted, ...]:
        return self.footprint.adapted

    @property
    def gated(self) -> frozenset[str]:
        return self.footprint.gated

    @property
    def skill_tasks(self) -> tuple[str, ...]:
        return self.footprint.skill_tasks


def is_large(members: Sequence[Member]) -> bool:
    """Whether a bank pays for these experts."""
    return sum(member.size for member in members) >= LARGE


@dataclass(frozen=True)
class PlannedExpert:
    """One expert of the recipe: a stored one, or a merge of several."""

    label: str
    weight: float
    members: tuple[Member, ...]
    merge: Method | None = None
    rank: int | None = None

    @property
    def changes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for member in self.members for name, shape in member.changes.items()}

    @property
    def digest(self) -> str:
        """Of the expert's content; of everything that it is made of, for a merge of several."""
        return self.members[0].digest if self.merge is None else digest_of(self.content)

    @property
    def content(self) -> list[Any]:
        """What decides its weights."""
        members = [(member.digest, member.weight) for member in self.members]
        return [members, self.weight, self.rank, self.merge and self.merge.record()]

    @property
    def low_rank(self) -> bool:
        if self.rank is not None:
            return True
        dense = self.merge is not None and self.merge.strategy.traits.dense
        return not dense and all(kinds[m.kind].low_rank for m in self.members)


@dataclass(frozen=True)
class Plan:
    """What a composition will read and change; nothing is left to look up.

    parameters: those that will change.  reads: bytes of weights.  memory: bytes of the composed
    model with what routing keeps beside it.  data: what the method
    learns from.  found: what it found before, coefficients or a router's state, which the recipe
    names or a lock pins.  parts: a plan for each, of a recipe with parts.
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
    parts: tuple[Plan, ...] = ()

    @property
    def units(self) -> tuple[Plan, ...]:
        """Plans of one method each: the parts, or the plan itself."""
        return self.parts or (self,)

    @property
    def routed(self) -> bool:
        """Whether some of its modules are routed while the model runs."""
        return any(unit.recipe.route is not None and not unit.folds for unit in self.units)

    @property
    def skilled(self) -> bool:
        """Whether its route is over an inventory of skills."""
        return any("skills" in method.strategy.needs for method in self.recipe.methods)

    @property
    def folds(self) -> bool:
        """Whether its route is for one task of an inventory, and so a plain LoRA."""
        known = len(self.members[0].skill_tasks) == 1
        return self.skilled and (known or self.task is not None)

    @property
    def task(self) -> str | None:
        """The one task that the recipe fixes for every input, if its method has such an option."""
        return self.recipe.method.task

    @property
    def members(self) -> list[Member]:
        return [member for expert in self.experts for member in expert.members]

    @cached_property
    def contents(self) -> list[Any]:
        """What decides the experts' weights."""
        return [expert.content for expert in self.experts]

    @property
    def digest(self) -> str:
        """Names the composition by content: the same digest and code give the same bits."""
        content: dict[str, Any] = {
            **self._options,
            "base": self.base.fingerprint,
            "experts": self.contents,
        }
        if self.recipe.stored and self.found:
            content[self._found_as] = self.found.digest
        elif self.data:
            content["data"] = self.data.digest
        return digest_of(content)

    @property
    def layers(self) -> list[int]:
        """The layers of the model that have something to change, -1 for what is in none."""
        return sorted({layer_of(name) for name in self.parameters})

    @property
    def keeps_state(self) -> bool:
        """Whether its method finds something that can be kept: coefficients, a router's state."""
        return any(method.strategy.keeps_state for method in self.recipe.methods)

    @property
    def _found_as(self) -> str:
        return "coefficients" if self.recipe.route is None else "router"

    @property
    def _options(self) -> dict[str, Any]:
        """What the recipe says besides base and experts."""
        return {
            "version": 1,
            **_ways(self.recipe),
            "targets": self.recipe.targets,
            "dtype": self.dtype,
            "seed": self.recipe.seed,
            "allow_base_mismatch": self.recipe.allow_base_mismatch,
        }

    @property
    def lock(self) -> dict[str, Any]:
        """Everything the composition is made of, pinned; the content of a lock file."""
        base = {"name": self.base.name, "fingerprint": self.base.fingerprint}
        return {
            "version": 1,
            "composition": self.digest,
            "base": base | {"sources": list(self.base.sources), "sha256": self.base.sha256},
            "experts": [_locked(expert) for expert in self.experts],
            **self._options,
            **({"data": self.data.record()} if self.data else {}),
            **({self._found_as: _locked_content(self.found)} if self.found else {}),
        }

    def record(self) -> dict[str, Any]:
        """The plan as plain values, for `--json`."""
        return {
            "digest": self.digest,
            **self.lock,
            "parameters": list(self.parameters),
            "reads_bytes": self.reads,
            "memory_bytes": self.memory,
        }


def _ways(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of its method, or of those of its parts."""
    if recipe.parts is None:
        return {recipe.method.kind: recipe.method.record()}
    ways = [{"targets": p.targets, p.method.kind: p.method.record()} for p in recipe.parts]
    return {"parts": ways}


def layer_of(name: str) -> int:
    """The first number in a module's path; -1 for a module outside of the layers."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else -1


def _locked_content(content: Content) -> dict[str, Any]:
    return {
        "expert": content.reference,
        "digest": content.digest,
        "sources": list(content.sources),
    }


def _locked(expert: PlannedExpert) -> dict[str, Any]:
    members = [
        _locked_content(m.content) | ({"task": m.task} if m.task else {}) for m in expert.members
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
