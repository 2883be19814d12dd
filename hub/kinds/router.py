"""The state of a router, which a recipe names under `router:`."""

from __future__ import annotations

from pathlib import Path

from experthub.hub.formats.router import read_router
from experthub.hub.kinds.kind import ExpertKind, kinds

ROUTER = "router.safetensors"
ROUTER_JSON = "router.json"


def _check(folder: Path) -> list[str]:
    """Check the record and the tensors of a router's state, and return their files' names."""
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
