"""The state of a recipe's method, which `hub coefficients` and `hub router` show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.cli._output import print_message
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.recipes.lock import Pins
    from experthub.hub.registry.content import Content


def find_state(
    recipe: Path,
    name: str | None,
    pins: Pins | None,
    device: str | None,
    registry: Path | None,
    *,
    routed: bool,
) -> tuple[Content, Any, Any]:
    """Find or make the state of a recipe's method, and register it if it gets a name.

    Args:
        recipe: The recipe.
        name: The name under which the state is registered; None registers nothing.
        pins: The use of the lock.
        device: The torch device.
        registry: A registry file that is searched first.
        routed: Whether the method must be a router; otherwise it must be a merge.

    Returns:
        The stored content, its record, and the state.

    Raises:
        UsageError: The method has no state, or is of the other kind.
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.registry.entries import check_name
    from experthub.hub.states.states import load_state, store_state
    from experthub.hub.transfer.describe import register_state

    if name is not None:
        check_name(name)
    with open_session(registry, device) as session:
        plan = plan_of(recipe, pins, session=session)
        if plan.routed != routed or not plan.keeps_state:
            method = plan.recipe.methods[0].method
            raise UsageError(
                f"{method} is not a router with a state"
                if routed
                else f"{method} is not a merge that learns coefficients",
                "use another method; hub methods NAME shows what a method needs",
            )
        content = plan.found or store_state(plan, session)
        record, state = load_state(plan, content, session)
    if name is not None:
        print_message(f"registered {register_state(content, name, session).reference}")
    return content, record, state
