"""The experts of a plan: stored ones and merges of them, and the parameters that they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experthub.hub.files.digests import digest_of
from experthub.hub.formats.adapter import Adapted
from experthub.hub.kinds import Footprint, kinds
from experthub.hub.recipes.method import Method
from experthub.hub.registry.content import Content

# A bank is mapped if the experts have at least this many bytes: this is faster than stacking them.
LARGE = 100_000_000


@dataclass(frozen=True)
class Member:
    """A stored expert of a plan: its content, its kind, and the parameters that it changes.

    Attributes:
        content: The content in the store.
        kind: The name of its kind.
        weight: The factor of its change within the planned expert.
        size: The bytes of its files.
        footprint: The changes that it makes.
    """

    content: Content
    kind: str
    weight: float
    size: int
    footprint: Footprint

    @property
    def reference(self) -> str:
        """The name by which the recipe calls the expert."""
        return self.content.reference

    @property
    def digest(self) -> str:
        """The digest of its content."""
        return self.content.digest

    @property
    def task(self) -> str | None:
        """The task that it was trained on, or None if it is unknown."""
        return self.content.task

    @property
    def changes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that it changes."""
        return self.footprint.shapes

    @property
    def adapted(self) -> tuple[Adapted, ...]:
        """The change of each module, for a low-rank expert."""
        return self.footprint.adapted

    @property
    def gated(self) -> Mapping[str, str]:
        """The modules that have a gate, each with the name of the gate's tensor."""
        return self.footprint.gated

    @property
    def own_changes(self) -> set[str]:
        """The names of the parameters that it changes by more than dense parts."""
        low = {a.parameter for a in self.adapted}
        return {name for name in self.changes if name not in self.footprint.dense or name in low}

    @property
    def skill_tasks(self) -> tuple[str, ...]:
        """The tasks that an inventory of skills knows."""
        return self.footprint.skill_tasks


def is_large(members: Sequence[Member]) -> bool:
    """Tell whether a bank is faster than stacking these experts.

    Args:
        members: The stored experts of a plan.

    Returns:
        True if their files are large.
    """
    return sum(member.size for member in members) >= LARGE


@dataclass(frozen=True)
class PlannedExpert:
    """An expert of the recipe: a stored one, or a merge of several.

    Attributes:
        label: Its name in reports.
        weight: The factor of its change.
        members: The stored experts that it is made of.
        merge: The merge, if it is one.
        rank: The rank that the merge is truncated to.
    """

    label: str
    weight: float
    members: tuple[Member, ...]
    merge: Method | None = None
    rank: int | None = None

    @property
    def changes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that the expert changes."""
        return {name: shape for member in self.members for name, shape in member.changes.items()}

    @property
    def digest(self) -> str:
        """The digest of the expert's content, or of everything that a merge is made of."""
        return self.members[0].digest if self.merge is None else digest_of(self.content)

    @property
    def content(self) -> list[Any]:
        """Everything that decides its weights."""
        members = [(member.digest, member.weight) for member in self.members]
        return [members, self.weight, self.rank, self.merge and self.merge.record()]

    @property
    def low_rank(self) -> bool:
        """True if every change is low-rank."""
        if self.rank is not None:
            return True
        dense = self.merge is not None and self.merge.strategy.traits.dense
        return not dense and all(kinds[m.kind].low_rank for m in self.members)


def count_virtual_tokens(experts: Sequence[PlannedExpert], routed: bool) -> int:
    """Count the virtual tokens that soft prompts or prefixes put before a text.

    Args:
        experts: The experts of a recipe.
        routed: Whether each text gets one of them; otherwise it gets all.

    Returns:
        The largest number of one expert, or the sum; 0 without soft prompts.
    """
    counts = [
        sum(m.footprint.prompt.tokens for m in expert.members if m.footprint.prompt)
        for expert in experts
    ]
    return max(counts, default=0) if routed else sum(counts)
