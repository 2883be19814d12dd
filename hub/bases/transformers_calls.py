"""Calls of transformers: no progress bars, no network, and one error for all of its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from logging import LogRecord, getLogger
from threading import Lock, get_ident
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError
from experthub.hub.transfer.remotes.no_network import forbid_network

# The blocks that hide progress bars now, and whether bars were shown before the first of them.
_hiding, _shown, _progress_bars = 0, True, Lock()


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block; the hub shows its own.

    The setting is one of the process, so the last of several threads restores it.

    Yields:
        Nothing.
    """
    global _hiding, _shown
    from transformers.utils import logging

    with _progress_bars:
        if not _hiding:
            _shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
        _hiding += 1
    try:
        yield
    finally:
        with _progress_bars:
            _hiding -= 1
            if _shown and not _hiding:
                logging.enable_progress_bar()


@contextmanager
def hide_report() -> Iterator[None]:
    """Hide the table of missing and unused weights inside the block, in this thread only.

    Yields:
        Nothing.
    """
    own = get_ident()

    def is_shown(record: LogRecord) -> bool:
        return get_ident() != own or "LOAD REPORT" not in record.getMessage()

    logger = getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


@contextmanager
def explain_loading_errors(base: Base, errors: Any, what: str = "load") -> Iterator[None]:
    """Turn errors that transformers raises while it loads or saves a base into a HubError.

    Args:
        base: The base.
        errors: The classes of the errors.
        what: What transformers does, for the message.

    Yields:
        Nothing.

    Raises:
        HubError: One of the errors was raised in the block.
    """
    try:
        with hide_progress_bars(), forbid_network():
            yield
    except errors as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(
            f"base {base.name}: transformers cannot {what} it: {reason}",
            f"check the files in {base.folder}; code that comes with a model is never run",
        ) from None


def list_loading_errors() -> tuple[type[Exception], ...]:
    """List the errors that transformers raises if it cannot load or save a model.

    Returns:
        The classes of the errors.
    """
    strict: type[Exception] = import_module("huggingface_hub.errors").StrictDataclassError
    wrong = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*wrong, OSError, RuntimeError, TypeError, ValueError, strict)
