"""The kind of learned coefficients, which a recipe names under `coefficients:`."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.coefficients import COEFFICIENTS, COEFFICIENTS_JSON, read_coefficients
from experthub.hub.kinds.kind import ExpertKind, kinds


def _check(folder: Path) -> list[str]:
    """Check the record and the tensor of coefficients; return the names of their files."""
    read_coefficients(folder / COEFFICIENTS_JSON, folder / COEFFICIENTS)
    return [COEFFICIENTS, COEFFICIENTS_JSON]


kinds.register(
    ExpertKind(
        name="coefficients",
        label="learned coefficients",
        marks=(COEFFICIENTS,),
        files=(COEFFICIENTS, COEFFICIENTS_JSON),
        check=_check,
        key="coefficients",
    )
)
