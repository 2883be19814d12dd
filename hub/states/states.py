"""The state of a plan's method: named, pinned, found from an earlier run, or made now and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from experthub.hub.errors import IntegrityError, UsageError, explain_errors
from experthub.hub.files.atomic import create_folder
from experthub.hub.files.memory import release_memory
from experthub.hub.materials.materials import open_materials
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import Expert
from experthub.hub.session import Session
from experthub.hub.states.run_state import (
    PROGRESS,
    covers_weights_only,
    run_folder,
    state_folder,
)
from experthub.hub.states.state_format import StateRecord, format_of
from experthub.hub.store.folder import read_folder
from experthub.hub.transfer.describe import write_description
from experthub.merge import ShapesState


def resolve_state(plan: Plan, session: Session) -> Any:
    """Return the state of a plan's method.

    A state that is worth keeping is made once: it is the one that the recipe names or a lock pins,
    or the one that an earlier run of the same composition made.

    Args:
        plan: A plan.
        session: The store, the registry, the device and the progress callback.

    Returns:
        The state; None for a method without state, and for a plan with parts, which have none.

    Raises:
        UsageError: The state does not fit the plan, or there is no data to make it from.
        ConflictError: A task differs from the one that the lock pins.
    """
    if plan.parts or plan.recipe.method.strategy.prepare is None:
        return None
    if not plan.recipe.method.strategy.keeps_state:
        return _make(plan, session)
    if plan.found is not None:
        return load_state(plan, plan.found, session)[1]
    folder = _find_or_make(plan, session)
    with _explain_damage(folder):
        record, state = format_of(plan).read(folder)
    _check_fits(record, plan, str(folder))
    return state


def load_state(plan: Plan, content: Content, session: Session) -> tuple[Any, Any]:
    """Load the state of a plan's method from the store.

    Args:
        plan: A plan of one method.
        content: The stored state.
        session: The store.

    Returns:
        The description of the state, and the state.

    Raises:
        IntegrityError: The files are damaged or do not fit each other.
        UsageError: The state does not fit the plan.
    """
    record, state = format_of(plan).load(content, session.store)
    _check_fits(record, plan, content.reference)
    return record, state


def store_state(plan: Plan, session: Session) -> Content:
    """Add the state of a plan's method to the store. If there is no state yet, the method makes it.

    Args:
        plan: A plan whose method keeps its state.
        session: The store, the registry, the device and the progress callback.

    Returns:
        The state as content of the store.

    Raises:
        UsageError: There is no data to make the state from.
    """
    folder = _find_or_make(plan, session)
    with _explain_damage(folder):
        digest, _ = session.store.add(folder)
    return Content(f"file:{folder}", digest, (f"file:{folder}",), None)


def _find_or_make(plan: Plan, session: Session) -> Path:
    """Return the folder of the state, which is made now unless an earlier run has made it."""
    folder = state_folder(plan)
    if not folder.is_dir():
        _keep(plan, _make(plan, session))
    elif covers_weights_only(plan, folder):
        session.report(
            f"note: {folder} was made by an earlier version, which compared the weights of "
            f"{plan.base.name}, but not its configuration; remove it to make it again",
            0,
            0,
        )
    return folder


def _make(plan: Plan, session: Session) -> Any:
    """Let the method prepare its state; it may learn, whatever the caller's gradient mode is."""
    method = plan.recipe.method
    prepare = method.strategy.prepare
    if prepare is None:
        raise ValueError(f"{method.method} has no state")
    with (
        explain_errors(method.method),
        torch.enable_grad(),
        open_materials(plan, session) as materials,
    ):
        state = prepare(materials, method.options)
        if plan.routed or method.strategy.keeps_state:
            format_of(plan).check(plan, state)
    del materials  # It holds the model that was trained or read.
    release_memory()
    return state


def _keep(plan: Plan, state: Any) -> None:
    """Write a state into its folder, with a description by which it can be added and pushed.

    If another process has stored its state there in the meantime, that state is kept.
    """
    folder, form = state_folder(plan), format_of(plan)
    with suppress(FileExistsError), create_folder(folder) as draft:
        form.write(draft, plan, state)
        identity = read_folder(draft).model_copy(update={"base_fingerprint": plan.base.fingerprint})
        described = Expert(
            name=plan.recipe.method.method,
            kind=form.kind,
            base=plan.base.name,
            digest=identity.digest,
            sources=[f"file:{folder}"],
            training={"data": plan.data.record()} if plan.data else {},
        )
        write_description(draft, described, identity)
    (run_folder(plan) / PROGRESS).unlink(missing_ok=True)


@contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Tell how a damaged state in the folder of an earlier run is made again."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(error.message, f"remove {folder} to make the state again") from error


def _check_fits(found: StateRecord, plan: Plan, name: str) -> None:
    """Refuse a state of another method, of other options that shape it, or of other experts."""
    method = plan.recipe.method
    if found.method != method.method:
        raise UsageError(
            f"{name} was made for {found.method}, and the recipe names {method.method}",
            f"set method: {found.method}",
        )
    for option, here in method.find_options(ShapesState).items():
        there = found.options.get(option)
        if there != here:
            raise UsageError(
                f"{name} was made with {option}: {there}, and the recipe sets {here}",
                f"set {option}: {there}",
            )
    made = [expert.digest for expert in found.experts]
    if made == [expert.digest for expert in plan.experts]:
        return
    labels = [expert.expert for expert in found.experts]
    changed = next((e.label for e in plan.experts if e.digest not in made), None)
    why = "in another order or for more experts"
    if changed is not None:
        why = f"for another version of {changed}" if changed in labels else f"not for {changed}"
    raise UsageError(
        f"{name} was made for {', '.join(labels)}, {why}; "
        f"the recipe has {', '.join(expert.label for expert in plan.experts)}",
        "name the same experts in the same order, "
        f"or remove {format_of(plan).kind}: to make the state again",
    )
