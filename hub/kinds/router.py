"""The kind of a router's state, which a recipe names under `router:`."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.router import ROUTER, ROUTER_JSON, read_router
from experthub.hub.kinds.kind import ExpertKind, kinds


def _check(folder: Path) -> list[str]:
    """Check the record and the tensors of a state; return the names of their files."""
    read_router(folder / ROUTER_JSON, folder / ROUTER)
    return [ROUTER, ROUTER_JSON]


kinds.register(
    ExpertKind(
        name="router",
        label="a router's state",
        marks=(ROUTER,),
        files=(ROUTER, ROUTER_JSON),
        check=_check,
        key="router",
    )
)
