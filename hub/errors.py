"""Errors that a user sees: each says what is wrong and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What transformers, torch, peft and others raise for what they cannot load, use or run.
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class HubError(Exception):
    """A failed operation.

    Args:
        message: What is wrong, with names, places and values.
        hint: The next step: a sentence that starts with a verb, or an empty text.

    Attributes:
        code: The exit code of a command that ends with this error.
    """

    code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message, also if it was changed after the error was made."""
        return self.message


class UsageError(HubError):
    """An error in a recipe, an option or a reference."""

    code = 2


class IntegrityError(HubError):
    """An error for damaged, unsafe or foreign content, none of which is used."""

    code = 3


class NotFoundError(HubError):
    """An error for an expert, a base, a task or a file that does not exist."""

    code = 4


class AuthError(HubError):
    """An error for access that a remote denies."""

    code = 5


class ConflictError(HubError):
    """An error for a name that other content has taken, or a lock file that is stale."""

    code = 6


@contextmanager
def explain_errors(what: str = "") -> Iterator[None]:
    """Turn a ValueError of a method or of the algebra into a HubError.

    Args:
        what: The subject of the error, such as the path of a module, which is put before the
            message.

    Raises:
        HubError: The block raised a MethodFailure.
        IntegrityError: The block raised a StateError.
        UsageError: The block raised another ValueError. The hint of a MethodError is kept.
    """
    try:
        yield
    except ValueError as error:
        message = f"{what}: {error}" if what else str(error)
        hint = getattr(error, "hint", "") or "change the recipe's weights or options"
        kind = UsageError if getattr(error, "is_usage", True) else HubError
        if getattr(error, "is_damage", False):
            kind = IntegrityError
        raise kind(message, hint) from None
