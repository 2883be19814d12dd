"""mttl imports much that its selectors and LoRA containers never call; `replace` makes do without it.

transformers is to be imported before: it looks for what is installed.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Training, data, plots, storage.
REPLACED = (
    "azure",
    "bitsandbytes",
    "einops",
    "mttl.datamodule",
    "mttl.dataloader",
    "mttl.evaluators",
    "mttl.models.lightning",
    "mttl.models.modifiers.sparse_mask",
    "mttl.models.ranker",
    "pandas",
    "prettytable",
    "pytorch_lightning",
    "sklearn",
    "wandb",
)


class Anything(ModuleType):
    """A module that has every name, each an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Replacing(MetaPathFinder, Loader):
    """Finds `Anything` for the modules that are replaced."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        named = any(f"{name}.".startswith(f"{start}.") for start in REPLACED)
        return ModuleSpec(name, self, is_package=True) if named else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def replace() -> None:
    """Let imports of these modules find `Anything` from now on."""
    sys.meta_path.insert(0, Replacing())
