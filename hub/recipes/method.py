"""A recipe's method: a merge or a router, with its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from experthub.hub.files.spelling import suggest_name
from experthub.hub.files.yaml_files import Closed
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from experthub.merge import Catalogue, Role, Strategy


class Method(Closed):
    """A merge or a router with its options, checked against the method's signature.

    Attributes:
        kind: `merge` or `route`.
        method: The name of the method.
        combine: What a router mixes: outputs, or parameters.
        kernel: The kernel of a route, as the recipe spells it.
        options: A value for every option.
    """

    kind: Literal["merge", "route"]
    method: str
    combine: Literal["outputs", "parameters"] = "outputs"
    kernel: str = "auto"
    options: dict[str, Any] = {}

    @property
    def strategy(self) -> Strategy[Any]:
        """The catalogue's entry."""
        return _catalogue(self.kind)[self.method]

    def find_options(self, role: Role) -> dict[str, Any]:
        """Return the options that have a role.

        Args:
            role: For example `experthub.merge.ShapesState`.

        Returns:
            Option name -> value.
        """
        return {name: self.options.get(name) for name in self.strategy.find_options(role)}

    @property
    def task(self) -> str | None:
        """The one task that the options fix for every input, if the method has such an option."""
        from experthub.merge import TaskName

        return next(iter(self.find_options(TaskName).values()), None)

    @property
    def examples_per_task(self) -> int | None:
        """The number of examples of each of the experts' own tasks that the method sees; None means all."""
        from experthub.merge import ExamplesPerTask

        return next(iter(self.find_options(ExamplesPerTask).values()), None)

    @property
    def inputs_per_step(self) -> int | None:
        """The number of inputs of each task that one step of learning reads; None means all."""
        from experthub.merge import InputsPerStep

        return next(iter(self.find_options(InputsPerStep).values()), None)

    def set_seed(self, seed: int) -> None:
        """Set the options that take the recipe's seed, unless the recipe sets them.

        Args:
            seed: The recipe's seed.
        """
        from experthub.merge import RecipeSeed

        for name in self.strategy.find_options(RecipeSeed):
            self.options.setdefault(name, seed)

    def record(self) -> dict[str, Any]:
        """Return the method as plain values, for digests and lock files.

        An option that was added to a method later is left out while it has its default value, so
        that older recipes keep their digests.

        Returns:
            The method's name, its way of mixing for a route, and its options.
        """
        from experthub.merge import LateOption

        late = self.strategy.find_options(LateOption)
        options = {
            name: value
            for name, value in self.options.items()
            if name not in late or value != self.strategy.options[name].default
        }
        mixing: dict[str, str] = {"combine": self.combine} if self.kind == "route" else {}
        if self.kernel != "auto":
            from experthub.routing import find_recorded_name

            mixing["kernel"] = find_recorded_name(self.kernel)
        return {"method": self.method, **mixing, **options}


def _catalogue(kind: Literal["merge", "route"]) -> Catalogue[Any]:
    """Return the catalogue of merges or of routers."""
    from experthub.merge import merges
    from experthub.routing import routers

    return merges if kind == "merge" else routers


def error_at(message: str, key: str, hint: str) -> PydanticCustomError:
    """Make an error at one key of the mapping that is being read.

    Args:
        message: What is wrong.
        key: The key.
        hint: The next step.

    Returns:
        The error, which `yaml_files.validate` turns into a UsageError with file and line.
    """
    context = {"message": message, "key": key, "hint": hint}
    return PydanticCustomError("hub_error", "{message}", context)


def _check_kernel(name: Any) -> None:
    """Refuse what is not the name of a kernel; earlier names are accepted."""
    from experthub.routing import KERNELS, RENAMED_KERNELS

    if name not in ("auto", *KERNELS, *RENAMED_KERNELS):
        raise error_at(
            f"expected {', '.join(('auto', *KERNELS[:-1]))} or {KERNELS[-1]}, found {name!r}",
            "kernel",
            "use auto: it measures which one is the fastest",
        )


def record_kernels(recipe: Any) -> Any:
    """Replace the kernels in a recipe's plain values by the names that digests use.

    Args:
        recipe: The values of a recipe file.

    Returns:
        The same values, with the earliest name of each kernel; they are not changed in place.
    """
    if not isinstance(recipe, dict):
        return recipe
    found, route, parts = dict(recipe), recipe.get("route"), recipe.get("parts")
    if isinstance(route, dict) and isinstance(route.get("kernel"), str):
        from experthub.routing import find_recorded_name

        found["route"] = {**route, "kernel": find_recorded_name(route["kernel"])}
    if isinstance(parts, list):
        found["parts"] = [record_kernels(part) for part in parts]
    return found


def read_method(kind: Literal["merge", "route"], value: Any) -> Method | None:
    """Read a method from the plain values of a recipe, and check it against the catalogue.

    Args:
        kind: `merge` or `route`.
        value: The value of this key.

    Returns:
        The method; None for null.

    Raises:
        PydanticCustomError: The method or an option is unknown or wrong.
    """
    from experthub.merge import RecipeSeed

    catalogue = _catalogue(kind)
    if value is None or isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise PydanticCustomError("method", "expected a mapping with the key 'method'")
    given = dict(value)
    name = given.pop("method")
    if name not in catalogue:
        other = _catalogue("route" if kind == "merge" else "merge")
        hint = suggest_name(name, catalogue) or "run hub methods"
        if name in other:
            hint = f"write it under '{other.kind}:', because {name} is a {other.kind}"
        for broken in catalogue.broken.values():  # One of them may be the package of the method.
            hint = f"{broken.hint} if it has this method; otherwise {hint}"
        raise error_at(f"unknown {kind} method {name!r}", "method", hint)
    strategy = catalogue[name]
    ways = strategy.traits.routing.combines if kind == "route" else ("outputs",)
    combine: Any = given.pop("combine", ways[0]) if kind == "route" else "outputs"
    kernel: Any = given.pop("kernel", "auto") if kind == "route" else "auto"
    _check_kernel(kernel)
    if combine not in ("outputs", "parameters"):
        raise error_at(
            f"expected outputs or parameters, found {combine!r}",
            "combine",
            "use outputs to mix B A x, or parameters to mix the B and the A",
        )
    if kind == "route" and combine not in ways:
        raise error_at(f"{name} cannot combine {combine}", "combine", f"set combine: {ways[0]}")
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
    for seed in set(strategy.find_options(RecipeSeed)) - set(given):
        del options[seed]  # The default is the recipe's own seed, which `set_seed` sets later.
    return Method(kind=kind, method=name, combine=combine, kernel=kernel, options=options)
