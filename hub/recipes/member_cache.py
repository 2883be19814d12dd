"""Sizes and shapes of many experts, cached so that a bank of them loads without their files.

An expert never changes under its digest. Reading an expert's record and sizes from the store costs a
dozen system calls; a cache hit costs none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.digests import digest_of
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import Adapted
from experthub.hub.kinds import Footprint, kinds
from experthub.hub.kinds.lora import LORA
from experthub.hub.recipes.planned_experts import Member
from experthub.hub.registry.content import Content

MEMBERS_VERSION = 2
PLAIN_FIELDS = 8  # of `Adapted`; the others are for changes that cannot be routed.


@dataclass(frozen=True)
class MemberCache:
    """A file with the sizes and shapes of the LoRAs of one composition, in their order.

    Attributes:
        path: The file.
    """

    path: Path

    @classmethod
    def for_composition(
        cls, contents: Iterable[Content], base: Base, allow_mismatch: bool
    ) -> MemberCache:
        """Return the cache of a composition.

        Args:
            contents: The contents of its experts, in order.
            base: The base.
            allow_mismatch: Whether experts of another base are accepted. This is checked before the
                file is written, and not again.

        Returns:
            The cache, whether its file exists or not.
        """
        digests = [content.digest for content in contents]
        key = digest_of([MEMBERS_VERSION, base.digest, allow_mismatch, digests])[7:23]
        return cls(hub_home() / "banks" / "members" / f"{key}.json")

    def load_members(self, named: Sequence[tuple[Content, float]]) -> list[Member] | None:
        """Read the members of a composition from the cache.

        Args:
            named: The contents of the experts with their weights, in order.

        Returns:
            The members; None if the cache has no file, or a damaged one.
        """
        found = self._read()
        if found is None:
            return None
        adapted = [_parse_adapted(rows) for rows in found["adapted"]]
        shapes = [{f"{a.module}.weight": a.shape for a in own} for own in adapted]
        gates: list[dict[str, str]] = found["gated"]
        return [
            Member(
                content, LORA.name, weight, size, Footprint(shapes[of], adapted[of], gates[gated])
            )
            for (content, weight), (size, of, gated) in zip(named, found["members"], strict=True)
        ]

    def write(self, members: Sequence[Member]) -> None:
        """Write the members of a composition to the cache, if all of them are LoRAs.

        Args:
            members: The members, in the order of the contents that `for_composition` was given.
        """
        if not all(kinds[m.kind] is LORA and _is_plain(m.footprint) for m in members):
            return
        adapted: dict[int, int] = {}
        gated: dict[int, int] = {}
        found: dict[str, Any] = {"adapted": [], "gated": [], "members": []}
        for member in members:
            if id(member.adapted) not in adapted:
                adapted[id(member.adapted)] = len(adapted)
                rows = [list(asdict(a).values())[:PLAIN_FIELDS] for a in member.adapted]
                found["adapted"].append(rows)
            if id(member.gated) not in gated:
                gated[id(member.gated)] = len(gated)
                found["gated"].append(dict(member.gated))
            row = [member.size, adapted[id(member.adapted)], gated[id(member.gated)]]
            found["members"].append(row)
        write_json(self.path, {**found, "check": digest_of(found)})

    def _read(self) -> dict[str, Any] | None:
        """Read the file; return None if there is none or if it is damaged."""
        try:
            found = read_json(self.path)
            whole = found.pop("check", None) == digest_of(found)
        except (HubError, OSError):
            return None
        with suppress(OSError):
            os.utime(self.path)  # hub gc deletes files that were not used for a week.
        return found if whole else None


def _is_plain(footprint: Footprint) -> bool:
    """Tell whether all changes are low-rank and of the weights of modules, which alone are routed."""
    if footprint.dense or footprint.rows:
        return False
    return all(change.leaf == "weight" and change.piece is None for change in footprint.adapted)


def _parse_adapted(rows: list[list[Any]]) -> tuple[Adapted, ...]:
    """Return how an expert changes its modules, from the rows of the file."""
    return tuple(
        Adapted(module, rank, scale, (shape[0], shape[1]), *rest)
        for module, rank, scale, shape, *rest in rows
    )
