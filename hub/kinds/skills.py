"""The kind of inventories of skills (Poly, MHR), which mix several LoRAs per task."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.skills import SKILLS, SKILLS_JSON, read_skills
from experthub.hub.kinds.footprint import Footprint
from experthub.hub.kinds.kind import ExpertKind, kinds
from experthub.hub.kinds.stored_expert import StoredExpert


def _check(folder: Path) -> list[str]:
    """Check the record and the tensors of an inventory; return the names of their files."""
    read_skills(folder / SKILLS_JSON, folder / SKILLS)
    return [SKILLS, SKILLS_JSON]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read which modules an inventory changes, and which tasks it has."""
    record, adapted = read_skills(expert.verify(SKILLS_JSON), expert.locate(SKILLS))
    shapes, placed = expert.check_low_rank(adapted)
    return Footprint(shapes, placed, skill_tasks=tuple(record.tasks))


INVENTORY = kinds.register(
    ExpertKind(
        name="skills",
        label="an inventory of skills",
        marks=(SKILLS,),
        files=(SKILLS, SKILLS_JSON),
        check=_check,
        footprint=_footprint,
        mapped=(SKILLS,),
        low_rank=True,
    )
)
