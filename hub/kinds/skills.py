"""Inventories of skills (Poly, MHR): several low-rank changes per module, mixed per task."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.skills import read_skills
from experthub.hub.kinds.kind import ExpertKind, Footprint, StoredExpert, kinds

SKILLS = "skills.safetensors"
SKILLS_JSON = "skills.json"


def _check(folder: Path) -> list[str]:
    """Check an inventory's record and tensors, and return their files' names."""
    read_skills(folder / SKILLS_JSON, folder / SKILLS)
    return [SKILLS, SKILLS_JSON]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read which modules an inventory changes, and which tasks it knows."""
    record, adapted = read_skills(expert.verify(SKILLS_JSON), expert.locate(SKILLS))
    shapes = expert.check_low_rank(adapted)
    return Footprint(shapes, adapted, skill_tasks=tuple(record.tasks))


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
