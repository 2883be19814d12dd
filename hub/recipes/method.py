"""A recipe's method: a merge or a router, with its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from experthub.hub.files import yaml_files
from experthub.hub.files.yaml_files import Closed
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from experthub.merge import Catalogue, Strategy


class Method(Closed):
    """A merge or a router with its options, checked against the method's signature."""

    kind: Literal["merge", "route"]
    method: str
    combine: Literal["outputs", "parameters"] = "outputs"
    kernel: Literal["auto", "all", "copied", "sampled", "screened"] = "auto"
    options: dict[str, Any] = {}

    @property
    def strategy(self) -> Strategy:
        """The catalogue's entry."""
        return _catalogue(self.kind)[self.method]


def _catalogue(kind: Literal["merge", "route"]) -> Catalogue:
    from experthub.merge import merges
    from experthub.routing import routers

    return merges if kind == "merge" else routers


def error_at(message: str, key: str, hint: str) -> PydanticCustomError:
    """An error at one key of the mapping that is being read."""
    context = {"message": message, "key": key, "hint": hint}
    return PydanticCustomError("hub_error", "{message}", context)


def method_of(kind: Literal["merge", "route"], value: Any) -> Method | None:
    """A method out of the plain values of a recipe, checked against the catalogue; None for null."""
    catalogue = _catalogue(kind)
    if value is None or isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise PydanticCustomError("method", "expected a mapping with the key 'method'")
    given = dict(value)
    name = given.pop("method")
    if name not in catalogue:
        other = _catalogue("route" if kind == "merge" else "merge")
        hint = yaml_files.did_you_mean(name, catalogue)
        if name in other:
            hint = f"{name} is a {other.kind}: write it under '{other.kind}:'"
        raise error_at(f"unknown {kind} method {name!r}", "method", hint)
    strategy = catalogue[name]
    ways = strategy.routing.combines
    combine: Any = given.pop("combine", ways[0]) if kind == "route" else "outputs"
    kernel: Any = given.pop("kernel", "auto") if kind == "route" else "auto"
    if kernel not in get_args(Method.model_fields["kernel"].annotation):
        raise error_at(
            f"expected auto, all, copied, sampled or screened, found {kernel!r}",
            "kernel",
            "auto measures which is the fastest",
        )
    if combine not in ("outputs", "parameters"):
        raise error_at(
            f"expected outputs or parameters, found {combine!r}",
            "combine",
            "outputs mixes B A x, parameters mixes the B and the A",
        )
    if kind == "route" and combine not in ways:
        raise error_at(f"{name} cannot combine {combine}", "combine", f"say combine: {ways[0]}")
    try:
        options = strategy.bind(given)
    except KeyError as error:
        key = error.args[0]
        known = ", ".join(
            ["method", *(["combine", "kernel"] if kind == "route" else []), *strategy.options]
        )
        raise PydanticCustomError("unknown_key", "", {"key": key, "known": known}) from None
    except ValueError as error:
        key = next((k for k in given if repr(k) in str(error)), "method")
        raise error_at(f"{name}: {error}", key, f"see hub methods {name}") from None
    if "seed" not in given:
        options.pop("seed", None)  # the recipe's own, which is not known here
    return Method(kind=kind, method=name, combine=combine, kernel=kernel, options=options)
