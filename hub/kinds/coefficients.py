"""Learned coefficients of a merge, which a recipe names under `coefficients:`."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.coefficients import read_coefficients
from experthub.hub.kinds.kind import ExpertKind, kinds

COEFFICIENTS = "coefficients.safetensors"
COEFFICIENTS_JSON = "coefficients.json"


def _check(folder: Path) -> list[str]:
    """Check the record and the tensor of coefficients, and return their files' names."""
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
