"""What resolving finds out about many experts, kept so that a bank of them loads without their files.

An expert never changes under its digest.  To look at it in the store takes a dozen calls of the system,
to know it again none.
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
from experthub.hub.recipes.plan import Member
from experthub.hub.registry.content import Content

VERSION = 1


@dataclass(frozen=True)
class MemberCache:
    """A file with sizes and shapes of the LoRAs of one composition, in their order."""

    path: Path

    @classmethod
    def of(cls, contents: Iterable[Content], base: Base, allow_mismatch: bool) -> MemberCache:
        """allow_mismatch: of bases, which is checked before it is written and never after."""
        digests = [content.digest for content in contents]
        key = digest_of([VERSION, base.fingerprint, allow_mismatch, digests])[7:23]
        return cls(hub_home() / "banks" / "members" / f"{key}.json")

    def members(self, named: Sequence[tuple[Content, float]]) -> list[Member] | None:
        """The members that contents with these weights are; None where they are not known."""
        found = self._read()
        if found is None:
            return None
        adapted = [_adapted(rows) for rows in found["adapted"]]
        shapes = [{f"{a.module}.weight": a.shape for a in own} for own in adapted]
        gates = [frozenset(names) for names in found["gated"]]
        return [
            Member(
                content, LORA.name, weight, size, Footprint(shapes[of], adapted[of], gates[gated])
            )
            for (content, weight), (size, of, gated) in zip(named, found["members"], strict=True)
        ]

    def write(self, members: Sequence[Member]) -> None:
        """Write what is known of a composition's members, if all of them are LoRAs.

        Args:
            members: The members, in the order of the contents that `of` was given.
        """
        if not all(kinds[member.kind] is LORA for member in members):
            return
        adapted: dict[int, int] = {}
        gated: dict[frozenset[str], int] = {}
        found: dict[str, Any] = {"adapted": [], "gated": [], "members": []}
        for member in members:
            if id(member.adapted) not in adapted:
                adapted[id(member.adapted)] = len(adapted)
                found["adapted"].append([list(asdict(a).values()) for a in member.adapted])
            if member.gated not in gated:
                gated[member.gated] = len(gated)
                found["gated"].append(sorted(member.gated))
            row = [member.size, adapted[id(member.adapted)], gated[member.gated]]
            found["members"].append(row)
        write_json(self.path, {**found, "check": digest_of(found)})

    def _read(self) -> dict[str, Any] | None:
        """What is in the file; None where there is none, or a damaged one."""
        try:
            found = read_json(self.path)
            check = found.pop("check", None)
        except (HubError, OSError):
            return None
        with suppress(OSError):
            os.utime(self.path)  # hub gc takes what was not used for long
        return found if check == digest_of(found) else None


def _adapted(rows: list[list[Any]]) -> tuple[Adapted, ...]:
    """Return how an expert changes its modules, from the rows of the file."""
    return tuple(
        Adapted(module, rank, scale, (shape[0], shape[1]), *rest)
        for module, rank, scale, shape, *rest in rows
    )
