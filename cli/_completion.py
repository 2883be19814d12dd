"""Values that a shell completes: names of experts, bases, methods and tasks, at the price of a list."""

from __future__ import annotations

import typer


def experts(ctx: typer.Context, incomplete: str) -> list[str]:
    """Experts and bases that the registries know; with versions once there is an @."""
    from experthub.hub.errors import HubError
    from experthub.hub.registry import Registry

    try:
        known = Registry.read(ctx.params.get("registry"))
    except (HubError, OSError):  # a shell in the middle of a line has no use for an error
        return []
    if "@" in incomplete:
        return [e.reference for e in known.experts()]
    return sorted({e.name for e in known.experts()} | set(known.bases()))


def tasks() -> list[str]:
    """The imported tasks."""
    from experthub.hub.tasks.task import list_references

    return list_references()


def methods() -> list[str]:
    """Merges and routers by the files they are in, one each: the catalogues would import torch."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec
    from pathlib import Path

    names = []
    for package in ("merge", "routing"):
        spec = find_spec(f"experthub.{package}")
        for folder in (spec and spec.submodule_search_locations) or ():
            names += [p.stem for p in Path(folder).glob("[!_]*.py")]
    for group in ("experthub.merges", "experthub.routers"):
        names += [point.name for point in entry_points(group=group)]
    return sorted(names)
