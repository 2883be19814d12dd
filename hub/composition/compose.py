"""Composition of a model from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from experthub.hub.bases.loading import AUTO
from experthub.hub.composition.assembly import assemble
from experthub.hub.composition.composition import Composition
from experthub.hub.composition.soft_prompts import load_merged, save_prompts
from experthub.hub.composition.streaming import write_merge
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from experthub.hub.states.states import resolve_state


def compose(
    recipe: Recipe | Plan | str | Path | dict[str, Any],
    *,
    device: str | None = None,
    model: Any = None,
    session: Session | None = None,
    state: Any = None,
) -> Composition:
    """Compose a base with experts, by a merge or a router.

    Args:
        recipe: The path of a recipe, its content as a mapping, a `Recipe`, or a `Plan`.
        device: The torch device of the model. The default is the session's device, or else `cpu`.
        model: A base that is loaded already. The composition shares the weights that do not change,
            and the model itself is never changed.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.
        state: The state of the recipe's method. The default is the stored one; if there is none,
            the method prepares it now.

    Returns:
        The composed model and its plan.

    Raises:
        HubError: The recipe, one of its experts or its base cannot be used; the class of the error
            says how.

    Example:
        >>> from experthub import hub
        >>> composition = hub.compose("recipe.yaml", device="cuda")  # doctest: +SKIP
        >>> composition.model.generate(...)  # doctest: +SKIP
    """
    session = session or Session()
    if device is not None:
        session = session.on(device)
    if isinstance(recipe, str | Path):
        recipe = Recipe.read(recipe)
    elif isinstance(recipe, dict):
        recipe = Recipe.of(recipe)
    plan = recipe if isinstance(recipe, Plan) else resolve(recipe, session=session, packed=True)
    if state is None:
        state = resolve_state(plan, session)
    return assemble(plan, session, state, model=model, device=device)


def write_model(plan: Plan, out: Path, format: Literal["hf", "peft"], session: Session) -> None:
    """Write the merged model of a plan to a folder, tensor by tensor where that is possible.

    Args:
        plan: A plan without routes.
        out: A new or empty folder.
        format: `hf` or `peft`, see `Composition.save`.
        session: The registry, the store, the device and the progress callback.

    Raises:
        HubError: An expert or the base cannot be used; the class of the error says how.
    """
    if plan.virtual_tokens:
        merged = load_merged(plan, session) if plan.recipe.merge else None
        save_prompts(merged, plan, out, format)
        return
    state = resolve_state(plan, session)
    in_memory = format == "peft" or session.device not in (None, "cpu", AUTO)
    if in_memory or not write_merge(plan, session, state, out):
        assemble(plan, session, state).save(out, format)
