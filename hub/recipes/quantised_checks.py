"""Checks that a recipe can use a quantised base."""

from __future__ import annotations

from collections.abc import Sequence

from experthub.hub.bases.base import Base
from experthub.hub.bases.quantised import check_loadable, check_merge
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import ADAPTER_CONFIG
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.registry.content import Content
from experthub.hub.session import Session
from experthub.hub.transfer.pull import pull


def check_quantised(
    recipe: Recipe, base: Base, contents: Sequence[Content], session: Session
) -> None:
    """Refuse a recipe that cannot use a quantised base; the hint names what the experts want.

    Args:
        recipe: The recipe.
        base: The quantised base.
        contents: The experts of the recipe.
        session: The store.

    Raises:
        HubError: The recipe merges, or the base cannot be loaded here.
    """
    merges = any(
        "skills" in m.strategy.needs or (m.kind == "merge" and not m.strategy.traits.prompts)
        for m in recipe.methods
    )
    named = []
    for content, identity in zip(contents, pull(session, *contents), strict=True):
        if ADAPTER_CONFIG in identity.files:
            settings = read_json(session.store.verify_file(content.digest, ADAPTER_CONFIG))
            named.append(str(settings.get("base_model_name_or_path")))
    if merges:
        check_merge(base, named)
    check_loadable(base, named)
