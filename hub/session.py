"""The session of an operation: its registry, its store, its device and its progress callback."""

from __future__ import annotations

from copy import copy
from functools import cache

from experthub.hub.progress import Report, silent
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store


class Session:
    """A registry, a store, a device and a progress callback, passed as one value.

    The registry and the store are opened when they are first used. An operation that does not use
    them therefore does not fail if they are damaged.

    Args:
        registry: The registry in which names are looked up. The default has every layer of
            `Registry.read()`.
        store: The store of the experts' content. The default is the store under `$HUB_HOME`.
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
        self.device, self.report = device, report
        self._registry = cache(lambda: Registry.read() if registry is None else registry)
        self._store = cache(lambda: Store() if store is None else store)

    @property
    def registry(self) -> Registry:
        """The registry in which names are looked up; it is read once, see `refresh`."""
        return self._registry()

    @property
    def store(self) -> Store:
        """The store of the experts' content."""
        return self._store()

    def on(self, device: str | None) -> Session:
        """Return a session with another device that shares the registry, the store and the callback.

        Args:
            device: The torch device of the new session. None means `cpu`.

        Returns:
            The new session. If one of the two opens the registry or the store, both use it.
        """
        other = copy(self)
        other.device = device
        return other

    def refresh(self) -> None:
        """Make the next use of the default registry read it again, because an entry was written.

        A registry that was passed by the caller stays as it is.
        """
        self._registry.cache_clear()
