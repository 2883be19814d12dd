"""Completion in a shell: names of experts, bases, tasks and methods, found without torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

import typer
from experthub.hub.files.safe_text import is_reference

if TYPE_CHECKING:
    from experthub.hub.registry.registry import Registry


def list_experts(ctx: typer.Context, incomplete: str) -> list[str]:
    """List the experts and bases that the registries know.

    Args:
        ctx: The context of the command line.
        incomplete: The word that is being typed.

    Returns:
        The names, or the experts' versions if the word contains an @.
    """
    known = _read_registry(ctx)
    if "@" in incomplete:
        return _keep_safe(e.reference for e in known.list_experts()) if known else []
    if known is None:
        return []
    return _keep_safe(sorted({e.name for e in known.list_experts()} | set(known.list_bases())))


def list_bases(ctx: typer.Context) -> list[str]:
    """List the bases that the registries know.

    Args:
        ctx: The context of the command line.

    Returns:
        The names.
    """
    known = _read_registry(ctx)
    return _keep_safe(known.list_bases()) if known else []


def _keep_safe(names: Iterable[str]) -> list[str]:
    """Keep the names that no shell evaluates: zsh evaluates the completions that it gets."""
    return [name for name in names if is_reference(name)]


def _read_registry(ctx: typer.Context) -> Registry | None:
    """Read the registry that the command would read; None if it cannot be read."""
    from experthub.hub.errors import HubError
    from experthub.hub.registry.registry import Registry

    try:
        return Registry.read(ctx.params.get("registry"))
    except (HubError, OSError):  # An error would disturb the line that is being typed.
        return None


def list_tasks() -> list[str]:
    """List the imported tasks.

    Returns:
        The references.
    """
    from experthub.hub.tasks.task_files import list_references

    return _keep_safe(list_references())


def list_splits() -> list[str]:
    """List the splits of a task.

    Returns:
        The names.
    """
    from experthub.hub.tasks.task import Split

    return list(get_args(Split))


def list_measures() -> list[str]:
    """List the ways to score a choice.

    Returns:
        The names.
    """
    from experthub.hub.readers.scorer import Measure

    return list(get_args(Measure))


def list_rules_for_long_texts() -> list[str]:
    """List the rules for texts with more tokens than a base can read.

    Returns:
        The names.
    """
    from experthub.hub.readers.scorer import Long

    return list(get_args(Long))


def list_methods() -> list[str]:
    """List the merges and routers by their files, because importing the catalogues loads torch.

    Returns:
        The names.
    """
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
    return _keep_safe(sorted(names))
