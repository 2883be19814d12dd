"""A block in which no library reaches the network: what transformers loads is always local."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

# Event -> the place of the host or the address among its arguments.
_EVENTS = {
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.connect": 1,
    "socket.sendto": 1,
}
_forbidden: ContextVar[bool] = ContextVar("network_forbidden", default=False)


class _OfflineFlag:
    """The value of `huggingface_hub.constants.HF_HUB_OFFLINE`: true inside `forbid_network`.

    The variable `HF_HUB_OFFLINE` is read once, when huggingface_hub is imported, and the constant
    belongs to all threads. This value is read at every request, and differs between threads: a
    push in another thread continues.
    """

    def __init__(self, before: object) -> None:
        self.before = before

    def __bool__(self) -> bool:
        return bool(self.before) or _forbidden.get()

    def __repr__(self) -> str:
        return repr(bool(self))


@contextmanager
def forbid_network() -> Iterator[None]:
    """Refuse every connection that this thread opens in the block, whichever library asks for it.

    huggingface_hub is offline, so that transformers and peft use their offline paths. The hook
    refuses what goes past huggingface_hub, such as the downloads of timm and of torch.hub.

    Yields:
        Nothing.
    """
    constants: Any = import_module("huggingface_hub.constants")
    if not isinstance(constants.HF_HUB_OFFLINE, _OfflineFlag):
        constants.HF_HUB_OFFLINE = _OfflineFlag(constants.HF_HUB_OFFLINE)
    _add_hook()
    before = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(before)


@cache
def _add_hook() -> None:
    """Add the audit hook. Python cannot remove one, and it does nothing outside such a block."""
    sys.addaudithook(_refuse_connections)


def _refuse_connections(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to look up a host or to reach one; sockets that are files are allowed."""
    if event not in _EVENTS or not _forbidden.get():
        return
    target = arguments[_EVENTS[event]]
    if not event.endswith(("connect", "sendto")) or isinstance(target, tuple):
        raise ConnectionError(f"a library asked for {target!r} while it worked on local files")
