"""Bases whose weights are quantised: which packages read them, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError, UsageError
from experthub.hub.formats.quantisation import find_original_name


def check_loadable(base: Base, named: Iterable[str] = ()) -> None:
    """Check that the package is installed that reads the weights of a base, if they are quantised.

    Args:
        base: The base.
        named: The names that the experts give to their base.

    Raises:
        HubError: The package is not installed, or the way of quantising is not known.
    """
    quantisation = base.quantisation
    if quantisation is None:
        return
    if not quantisation.supported:
        raise HubError(
            f"base {base.name} is quantised {quantisation.label}, which is not supported",
            describe_original(base, named),
        )
    package = quantisation.package
    if package is not None and find_spec(package.replace("-", "_")) is None:
        raise HubError(
            f"base {base.name} is quantised {quantisation.label}, "
            f"and {package}, which reads such weights, is not installed",
            f"{describe_original(base, named)}, or run pip install {package}",
        )


def check_merge(base: Base, named: Iterable[str] = ()) -> None:
    """Check that the weights of a base can be changed, if the base is quantised.

    Args:
        base: The base.
        named: The names that the experts give to their base.

    Raises:
        UsageError: The weights are packed.
    """
    quantisation = base.quantisation
    if quantisation is not None and not quantisation.dequantised:
        raise UsageError(
            f"base {base.name} is quantised {quantisation.label}, "
            "and a merge adds to the weights themselves",
            describe_original(base, named),
        )


def describe_original(base: Base, named: Iterable[str] = ()) -> str:
    """Describe how a user gets the model that a quantised base was made from, as a hint.

    Args:
        base: The base.
        named: The names that experts give to their base.

    Returns:
        The hint.
    """
    own = base.name.removeprefix("hf:").partition("@")[0]
    names = own, *(name.removeprefix("hf:") for name in named)
    found = next(filter(None, map(find_original_name, names)), None)
    if found is None or found.count("/") > 1:
        return "set base: to the model that it was quantised from, a folder or hf:org/name"
    return f"set base: to the unquantised {'hf:' if '/' in found else ''}{found}"
