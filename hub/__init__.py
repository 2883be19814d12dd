"""The hub's public API; every name is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experthub.hub.bases.adding import add_base
    from experthub.hub.composition.compose import compose
    from experthub.hub.composition.composition import Composition
    from experthub.hub.conversion.convert import Conversion, convert
    from experthub.hub.errors import HubError
    from experthub.hub.evaluation.evaluation import evaluate
    from experthub.hub.finetunes.difference import Difference, diff
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.recipes.lock_file import Lock
    from experthub.hub.recipes.plan import Plan
    from experthub.hub.recipes.recipe import Recipe
    from experthub.hub.recipes.resolution import resolve
    from experthub.hub.registry.expert import Expert
    from experthub.hub.registry.registry import Registry
    from experthub.hub.selection.clusters import cluster
    from experthub.hub.selection.measuring import suggest
    from experthub.hub.session import Session
    from experthub.hub.store.store import Store
    from experthub.hub.tracing.trace import Trace, trace
    from experthub.hub.training.adaptation import adapt
    from experthub.hub.training.fit import Settings
    from experthub.hub.training.full import train_full
    from experthub.hub.training.inventory import InventoryShape
    from experthub.hub.training.skills import train_skills
    from experthub.hub.training.train import train_gate, train_lora

_HOMES = {
    "add_base": "bases.adding",
    "Composition": "composition.composition",
    "Conversion": "conversion.convert",
    "Difference": "finetunes.difference",
    "Expert": "registry.expert",
    "HubError": "errors",
    "InventoryShape": "training.inventory",
    "Lock": "recipes.lock_file",
    "Plan": "recipes.plan",
    "Recipe": "recipes.recipe",
    "Registry": "registry.registry",
    "Session": "session",
    "Settings": "training.fit",
    "Store": "store.store",
    "Trace": "tracing.trace",
    "adapt": "training.adaptation",
    "cluster": "selection.clusters",
    "compose": "composition.compose",
    "convert": "conversion.convert",
    "diff": "finetunes.difference",
    "evaluate": "evaluation.evaluation",
    "plan_of": "recipes.lock",
    "resolve": "recipes.resolution",
    "suggest": "selection.measuring",
    "trace": "tracing.trace",
    "train_full": "training.full",
    "train_gate": "training.train",
    "train_lora": "training.train",
    "train_skills": "training.skills",
}

__all__ = [
    "Composition",
    "Conversion",
    "Difference",
    "Expert",
    "HubError",
    "InventoryShape",
    "Lock",
    "Plan",
    "Recipe",
    "Registry",
    "Session",
    "Settings",
    "Store",
    "Trace",
    "adapt",
    "add_base",
    "cluster",
    "compose",
    "convert",
    "diff",
    "evaluate",
    "plan_of",
    "resolve",
    "suggest",
    "trace",
    "train_full",
    "train_gate",
    "train_lora",
    "train_skills",
]


if not TYPE_CHECKING:  # Type checkers then know the names above and no others.

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"experthub.hub.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
