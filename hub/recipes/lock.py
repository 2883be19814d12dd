"""Lock files, which pin the base and the experts of a recipe by digest and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import ConflictError, NotFoundError, UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import hub_home
from experthub.hub.files.digests import digest_of
from experthub.hub.recipes.entries import DataUse, ExpertUse
from experthub.hub.recipes.examples import PlannedData
from experthub.hub.recipes.lock_file import (
    SUFFIX,
    Lock,
    LockedBase,
    LockedExpert,
    LockedTask,
    lock_path,
)
from experthub.hub.recipes.method import record_kernels
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import find_content, resolve
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.layers import Layer
from experthub.hub.registry.registry import Registry
from experthub.hub.registry.registry_file import BaseEntry, RegistryFile
from experthub.hub.session import Session
from experthub.hub.states.states import store_state
from experthub.hub.tasks.task_files import read_task
from experthub.hub.transfer.remotes._hf_files import HfSource
from pydantic import ValidationError

Pins = Literal["locked", "frozen"]


def compute_recipe_digest(path: Path) -> str:
    """Compute the digest of a recipe file's values.

    Args:
        path: The recipe file.

    Returns:
        The digest; comments and layout do not count.
    """
    return digest_of(record_kernels(yaml_files.read(path).value))


def lock(path: Path, session: Session, *, update: Sequence[str] | None = ()) -> Lock:
    """Make the current lock of a recipe, and fetch everything that it pins into the store.

    A method that needs a state gets it now, unless a stored state fits. An expert keeps the content
    that the present lock records for it while its reference still allows that. No file is written.

    Args:
        path: The recipe file.
        session: The registry, the store, the device and the progress callback.
        update: Names whose newest version is used instead. None means all names.

    Returns:
        The lock.

    Raises:
        HubError: The recipe does not resolve; see `resolve`.
    """
    recipe = Recipe.read(path)
    held = lock_path(path)
    before = Lock.read(held) if held.is_file() else None
    known = before.members if before else []
    pinned = [_find_pinned(use, known, update) or find_content(use, session) for use in recipe.uses]
    plan = resolve(recipe, session=session, pinned=pinned)
    if before and before.base.digest not in (None, plan.base.digest):
        session.report(f"note: {path} pins another state of {plan.base.name} than before", 0, 0)
    if plan.keeps_state and plan.found is None:
        plan = replace(plan, found=store_state(plan, session))
    return Lock.of(plan, compute_recipe_digest(path))


def _find_pinned(
    use: ExpertUse, known: Sequence[LockedExpert], update: Sequence[str] | None
) -> Content | None:
    """Return the content that the lock pins for an entry, or None if it must be looked up."""
    if update is None or Reference.parse(use.expert).name in update:
        return None
    return next((entry.content for entry in known if _can_refer_to(use, entry)), None)


def _can_refer_to(use: ExpertUse, entry: LockedExpert) -> bool:
    """Tell whether a recipe's reference still refers to the pinned content."""
    wanted = Reference.parse(use.expert)
    if not wanted.name:
        return use.expert == entry.expert
    held = Reference.parse(entry.expert)
    return (
        wanted.name == held.name
        and wanted.version in (None, held.version)
        and entry.digest.startswith(wanted.digest)
    )


def plan_of(
    path: Path | str,
    pins: Pins | None = None,
    *,
    session: Session | None = None,
) -> Plan:
    """Resolve a recipe file, to what its lock pins if `pins` is set.

    Args:
        path: The recipe file.
        pins: `locked` uses what the lock pins, and checks that the registries still give its names
            the same meaning. `frozen` uses the lock as it is and reads no registry. None looks up
            everything anew.
        session: The registry, the store and the progress callback. The default is `Session()`.

    Returns:
        The plan.

    Raises:
        NotFoundError: There is no lock, or a name is unknown.
        ConflictError: The recipe, a name or the base has changed since the lock was written.
    """
    session, path = session or Session(), Path(path)
    recipe = Recipe.read(path)
    if pins is None:
        return resolve(recipe, session=session)
    held = Lock.read(lock_path(path))
    if held.recipe != compute_recipe_digest(path):
        raise ConflictError(f"{path} has changed since it was locked", f"run hub lock {path}")
    if held.version == 1:
        session.report(
            f"note: {lock_path(path)} covers the weights of {held.base.name}, but not its "
            f"configuration and its tokenizer; run hub lock {path} to cover them",
            0,
            0,
        )
    contents = [member.content for member in held.members]
    encoders: dict[str, Base] = {}
    if pins == "locked":
        contents = [_check_meaning(content, session.registry, path) for content in contents]
    else:
        pinned = held.encoders or {}
        encoders = {n: find(n, session) for n in recipe.encoder_names if n not in pinned}
        own = _make_locked_registry({recipe.base: held.base, **pinned}, path)
        session = Session(own, session.store, session.device, session.report)
        encoders |= {n: find(_pin_commit(n, entry), session) for n, entry in pinned.items()}
        recipe = recipe.model_copy(update={"base": _pin_commit(recipe.base, held.base)})
    data = None
    if held.data:
        use = recipe.data or DataUse.model_validate(held.data.use)
        data = PlannedData(use, tuple(_read_task_digest(task, pins) for task in held.data.tasks))
    kept = held.coefficients or held.router
    found = kept.content if kept else None
    if found and pins == "locked" and recipe.stored:
        found = _check_meaning(found, session.registry, path)
    plan = resolve(
        recipe, session=session, pinned=contents, data=data, found=found, encoders=encoders
    )
    _check_composition(plan, held, path)
    return plan


def _check_composition(plan: Plan, held: Lock, path: Path) -> None:
    """Refuse a plan that is not the one that a lock pins, and say what has changed."""
    digest = plan.weights_digest if held.version == 1 else plan.digest
    if digest == held.composition:
        return
    here, there = plan.base, held.base
    what, pinned = "the base or the lock was changed", held.encoders or {}
    for name, encoder in plan.encoders.items():
        if name not in pinned or pinned[name].digest != encoder.digest:
            what = f"the encoder {name} or the lock was changed"
    if here.fingerprint != there.fingerprint:
        what = f"the weights of {here.name} were changed"
    elif there.digest and here.digest != there.digest:
        what = f"the configuration, the tokenizer or a processor of {here.name} was changed"
    raise ConflictError(
        f"{path} resolves to {digest[:19]}, and its lock says {held.composition[:19]}: {what}",
        f"{_describe_restoring(here)}, or run hub lock {path} to accept the change",
    )


def _describe_restoring(base: Base) -> str:
    """Describe how a user restores a base, as the beginning of a hint."""
    if base.folder.resolve().is_relative_to(hub_home().resolve()):
        return "run hub verify --repair to restore the base"
    return f"restore {base.folder}"


def _pin_commit(source: str, base: LockedBase) -> str:
    """Return a source of a base, at the commit that a lock pins if it is a repository."""
    if base.commit is None or not source.startswith("hf:"):
        return source
    return f"hf:{HfSource.parse(source).repository}@{base.commit}"


def _read_task_digest(locked: LockedTask, pins: Pins) -> str:
    """Return the present digest of a task.

    With `frozen`, or if the task is not installed, return the pinned digest.
    """
    if pins == "frozen":
        return locked.digest
    try:
        return read_task(locked.task).digest
    except NotFoundError:
        return locked.digest


def _check_meaning(content: Content, registry: Registry, path: Path) -> Content:
    """Return the registry's entry for pinned content; reject different content."""
    reference = Reference.parse(content.reference)
    if not reference.name:
        return content
    known = Content.from_expert(registry.find_expert(reference))
    if known.digest != content.digest:
        raise ConflictError(
            f"{content.reference} is {known.digest[:19]} now, and the lock of {path} says "
            f"{content.digest[:19]}",
            f"run hub lock {path}, or use --frozen",
        )
    return known


def _make_locked_registry(pinned: Mapping[str, LockedBase], path: Path) -> Registry:
    """Make a registry that has only the pinned bases, under their names in the recipe."""
    entries: dict[str, BaseEntry] = {}
    for name, base in pinned.items():
        if Reference.parse(name).folder or Reference.parse(name).remote:
            continue
        entries[base.name] = BaseEntry(
            sources=[_pin_commit(source, base) for source in base.sources],
            sha256=base.sha256,
            fingerprint=base.fingerprint,
            aka=[name],
        )
    try:
        known = RegistryFile(version=1, bases=entries)
    except ValidationError:
        raise UsageError(
            f"{lock_path(path)}: {' or '.join(map(repr, entries))} is not a name for a base",
            f"run hub lock {path}",
        ) from None
    return Registry((Layer(lock_path(path), known),))


def check_lock(path: Path, session: Session) -> Lock:
    """Check that a recipe's lock is up to date, as `--locked` does.

    Args:
        path: The recipe file.
        session: The registry, the store and the progress callback.

    Returns:
        The lock.

    Raises:
        NotFoundError: There is no lock, or a name is unknown.
        ConflictError: The recipe, a name or the base has changed since the lock was written.
    """
    plan_of(path, "locked", session=session)
    return Lock.read(lock_path(path))


def find_recipes_with(name: str, folder: Path) -> list[Path]:
    """Find the recipes of a folder whose locks pin an expert.

    Args:
        name: The name of the expert.
        folder: The folder of the recipes.

    Returns:
        The recipe files.

    Raises:
        NotFoundError: No lock pins the expert.
    """
    found: list[Path] = []
    for held in sorted(folder.glob(f"*{SUFFIX}")):
        names = {Reference.parse(m.expert).name for m in Lock.read(held).members}
        stem = held.name.removesuffix(SUFFIX)
        recipes = [held.with_name(stem + suffix) for suffix in (".yaml", ".yml")]
        found += [recipe for recipe in recipes if name in names and recipe.is_file()][:1]
    if not found:
        raise NotFoundError(f"no lock in {folder} pins {name}", f"run hub update {name} RECIPE")
    return found
