"""Errors that a user sees: what is wrong, why, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class HubError(Exception):
    """An operation failed.

    message: the thing and the reason.  hint: the next step.  code: the command's exit code.
    """

    code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HubError):
    """A wrong recipe, option or reference."""

    code = 2


class IntegrityError(HubError):
    """Damaged, unsafe or foreign content: nothing of it is used."""

    code = 3


class NotFoundError(HubError):
    """An expert, base or task that no registry or folder has."""

    code = 4


class AuthError(HubError):
    """A remote that refuses who asks."""

    code = 5


class ConflictError(HubError):
    """The name is taken by other content, or somebody else was faster."""

    code = 6


@contextmanager
def explain_errors(what: str = "") -> Iterator[None]:
    """Turn a ValueError of the algebra or of a method into a UsageError with context.

    Args:
        what: What the error is about, for example the name of a module; it stands before the
            message.

    Raises:
        UsageError: The block raised a ValueError. Its hint is kept if it has one (`MethodError`).
    """
    try:
        yield
    except ValueError as error:
        message = f"{what}: {error}" if what else str(error)
        hint = getattr(error, "hint", "") or "change the recipe's weights or options"
        raise UsageError(message, hint) from None
