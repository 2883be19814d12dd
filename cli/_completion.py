"""Values that a shell completes: names of experts, bases, methods and tasks, at the price of a list."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import typer

if TYPE_CHECKING:
    from experthub.hub.registry.registry import Registry


def experts(ctx: typer.Context, incomplete: str) -> list[str]:
    """Experts and bases that the registries know; with versions once there is an @."""
    known = _registry(ctx)
    if "@" in incomplete:
        return [e.reference for e in known.experts()] if known else []
    return sorted({e.name for e in known.experts()} | set(known.bases())) if known else []


def bases(ctx: typer.Context) -> list[str]:
    """The bases that the registries know."""
    known = _registry(ctx)
    return list(known.bases()) if known else []


def _registry(ctx: typer.Context) -> Registry | None:
    """The registry that the command would read; None when it cannot be read."""
    from experthub.hub.errors import HubError
    from experthub.hub.registry.registry import Registry

    try:
        return Registry.read(ctx.params.get("registry"))
    except (HubError, OSError):  # a shell in the middle of a line has no use for an error
        return None


def tasks() -> list[str]:
    """The imported tasks."""
    from experthub.hub.tasks.task_files import list_references

    return list_references()


def splits() -> list[str]:
    """The splits of a task."""
    from experthub.hub.tasks.task import Split

    return list(get_args(Split))


def measures() -> list[str]:
    """What a choice is scored by."""
    from experthub.hub.readers.scorer import Measure

    return list(get_args(Measure))


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
