"""Find out whether the base of an expert is on this machine, as a proof needs; light to import."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from experthub.hub.bases.base_sources import is_available_locally
from experthub.hub.bases.gguf_files import find_gguf_files
from experthub.hub.errors import HubError
from experthub.hub.files.spelling import find_similar
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session


class CannotProveError(HubError):
    """An error for a proof that cannot be made here, which does not speak against the expert."""


def check_base_is_local(name: str, registry: Registry) -> None:
    """Check that a base can be loaded without a download.

    Args:
        name: The name of the base, or its folder.
        registry: The registry.

    Raises:
        CannotProveError: The base is not on this machine.
    """
    known = registry.has_base(name)
    if known:
        here = is_available_locally(registry.find_base(name)[0], registry)
    else:
        here = name.startswith(("/", "./", "../")) and (
            (Path(name) / "config.json").is_file() or bool(find_gguf_files(name, Path.cwd()))
        )
    if not here:
        raise CannotProveError(
            f"the base {name} is not on this machine{'' if known else _suggest(name, registry)}",
            f"run hub pull {name}, then hub add" if known else "pass --base with its folder",
        )


def _suggest(name: str, registry: Registry) -> str:
    """Ask about a similar name, if a plain name of a base is not known."""
    plain = "/" not in name and ":" not in name
    near = find_similar(name, registry.list_bases()) if plain else None
    return f"; did you mean {near!r}?" if near else ""


def name_peft() -> str:
    """Name peft with its version.

    Returns:
        The name.
    """
    return f"peft {version('peft')}"


def report_missing(against: str, error: CannotProveError, session: Session) -> None:
    """Report that there is no proof, and why.

    Args:
        against: The name of the other library.
        error: The reason.
        session: The progress callback.
    """
    session.report(f"note: not compared with {against}: {error.message}", 0, 0)
