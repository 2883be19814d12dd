"""Errors of a model that runs: some values in a base's files fail only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experthub.hub.errors import LIBRARY_ERRORS, HubError


@contextmanager
def explain_forward_errors(model: Any, what: str = "run") -> Iterator[None]:
    """Turn errors that a model raises when it runs into a HubError.

    Args:
        model: The model, whose configuration knows the folder of its base.
        what: What the model is to do.

    Yields:
        Nothing.

    Raises:
        HubError: The model raised an error that is none of the hub's own.
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        folder = Path(str(model.config.name_or_path))
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        settings = folder / "generation_config.json"
        if "memory" in reason.lower():
            hint = "use shorter texts, or a device with more memory"
        elif what == "generate with" and settings.is_file():
            hint = f"correct or remove {settings}, or correct {folder / 'config.json'}"
        else:
            hint = f"correct {folder / 'config.json'}"
        raise HubError(f"base {folder}: transformers cannot {what} it: {reason}", hint) from error
