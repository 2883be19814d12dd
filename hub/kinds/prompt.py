"""The kind of soft prompts and prefixes, which stand before a text and change no weight."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.prompt import PROMPT, read_prompt
from experthub.hub.kinds.footprint import Footprint
from experthub.hub.kinds.kind import ExpertKind, kinds
from experthub.hub.kinds.stored_expert import StoredExpert


def _check(folder: Path) -> list[str]:
    """Check the file of a soft prompt or of a prefix; return its name."""
    read_prompt(folder / PROMPT)
    return [PROMPT]


def _footprint(expert: StoredExpert) -> Footprint:
    """Read the shape of a soft prompt, which changes no parameter."""
    return Footprint({}, prompt=read_prompt(expert.locate(PROMPT)))


SOFT_PROMPT = kinds.register(
    ExpertKind(
        name="prompt",
        label="a soft prompt",
        marks=(PROMPT,),
        files=(PROMPT,),
        check=_check,
        footprint=_footprint,
        mapped=(PROMPT,),
    )
)
