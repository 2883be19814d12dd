"""The surroundings of an operation: where names and content are found, where models run, and who is told."""

from __future__ import annotations

from functools import cached_property

from experthub.hub.progress import Report, silent
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store


class Session:
    """A registry, a store, a device and a progress callback, passed as one value.

    The registry and the store are opened when they are first used, so that an operation that needs
    neither fails for neither.

    Args:
        registry: Where names are looked up. The default is every layer of `Registry.read()`.
        store: Where content is kept. The default is the store under `$HUB_HOME`.
        device: The torch device that models run on. None means `cpu`.
        report: A callback for progress. The default ignores it.

    Example:
        >>> from experthub.hub import Session
        >>> Session(device="cpu").device
        'cpu'
    """

    def __init__(
        self,
        registry: Registry | None = None,
        store: Store | None = None,
        device: str | None = None,
        report: Report = silent,
    ) -> None:
        self.device = device
        self.report = report
        if registry is not None:
            self.registry = registry
        if store is not None:
            self.store = store

    @cached_property
    def registry(self) -> Registry:
        """Where names are looked up."""
        return Registry.read()

    @cached_property
    def store(self) -> Store:
        """Where content is kept."""
        return Store()
