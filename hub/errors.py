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
def explained(what: str) -> Iterator[None]:
    """The boundary where short facts of the algebra get their context."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{what}: {error}", "change the recipe's weights or options") from None
