"""Catalogues of methods: each entry is a function with its paper, options and preparation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar

from experthub.merge._options import Option, Role, read_options
from experthub.merge._plugin_error import PluginError, report_broken

Function = TypeVar("Function", bound=Callable[..., Any])
Traits = TypeVar("Traits")
Options = Mapping[str, Any]
# Materials that are made from examples of the tasks that the experts were trained on.
OWN_TASK_MATERIALS = frozenset({"activations", "index", "texts"})
MATERIALS = OWN_TASK_MATERIALS | {"data", "gates", "hidden", "skills", "task"}


class MethodError(ValueError):
    """An error for an option or an expert that a method cannot use.

    Args:
        message: What was expected, and what was found.
        hint: The next step: a sentence that starts with a verb.
    """

    is_usage = True

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class MethodFailure(MethodError):
    """An error although the options are right: shapes do not fit, or training diverges.

    Commands end with exit code 1 instead of 2.
    """

    is_usage = False


class ExpertOutline(Protocol):
    """An expert before its weights are read."""

    @property
    def label(self) -> str:
        """The name of the expert in the recipe."""
        ...

    @property
    def weight(self) -> float:
        """The weight that the recipe gives to the expert."""
        ...

    @property
    def is_merge(self) -> bool:
        """True if the expert is itself a merge of experts."""
        ...

    def rank_of(self, parameter: str) -> int | None:
        """Return the rank of the expert's change of a parameter; None if it has no such change."""
        ...


@dataclass(frozen=True)
class Outline:
    """A recipe before weights are read, for checks that a method makes early.

    Args:
        experts: The experts, in the recipe's order.
        parameters: The names of the parameters that the method may change.
    """

    experts: Sequence[ExpertOutline]
    parameters: Sequence[str]

    def describe_ranks(self, parameter: str) -> str | None:
        """Describe the ranks of the experts' changes of a parameter if they differ.

        Args:
            parameter: The name of the parameter.

        Returns:
            Each rank with the name of an expert, such as `3 (plain), 4 (other)`; None if at most one
            rank occurs.
        """
        found = {e.rank_of(parameter) or 0: e.label for e in self.experts if e.rank_of(parameter)}
        text = ", ".join(f"{rank} ({label})" for rank, label in sorted(found.items()))
        return text if len(found) > 1 else None


def _need_no_labels(options: Options) -> bool:
    """Return False, because a method without `needs_labels=` never reads labels."""
    return False


@dataclass(frozen=True)
class Strategy(Generic[Traits]):
    """A method under its name in recipes.

    Args:
        name: The name in recipes, which is the function's name.
        call: The function.
        kind: The key of a recipe under which the method stands: `merge` or `route`.
        paper: A URL of the paper.
        options: The options by name.
        traits: The properties that only methods of this kind have.
        needs: The materials that the method needs besides the experts' weights, by name.
        prepare: A function `prepare(materials, options) -> state` that makes the method's state.
        keeps_state: Whether the state is stored; otherwise it is made anew each time.
        needs_labels: A function of the options that returns whether the method reads the labels of
            the data.
        check: A function of an outline and the options that raises MethodError if they do not fit,
            before weights are read.
    """

    name: str
    call: Callable[..., Any]
    kind: str
    paper: str
    options: Mapping[str, Option]
    traits: Traits
    needs: tuple[str, ...] = ()
    prepare: Callable[[Any, Options], Any] | None = None
    keeps_state: bool = False
    needs_labels: Callable[[Options], bool] = _need_no_labels
    check: Callable[[Outline, Options], None] | None = None

    @property
    def needs_data(self) -> bool:
        """True if a recipe must set `data:`, or name the state that was made from data."""
        return "data" in self.needs

    @property
    def needs_own_tasks(self) -> bool:
        """True if the method reads examples of the tasks that the experts were trained on."""
        return not OWN_TASK_MATERIALS.isdisjoint(self.needs)

    @property
    def summary(self) -> str:
        """The first paragraph of the method's docstring."""
        return (inspect.getdoc(self.call) or "").split("\n\n")[0].replace("\n", " ")

    def bind(self, given: Options) -> dict[str, Any]:
        """Check the options of a recipe, and add the defaults of the others.

        Args:
            given: Option values by name.

        Returns:
            A value for every option.

        Raises:
            KeyError: An option is unknown; the argument is its name.
            ValueError: A value is wrong, or a required option is missing.
        """
        for name in given:
            if name not in self.options:
                raise KeyError(name)
        for option in self.options.values():
            if option.required and option.name not in given:
                raise ValueError(f"option {option.name!r} is required")
        return {
            name: option.check(given[name]) if name in given else option.default
            for name, option in self.options.items()
        }

    def find_options(self, role: Role) -> list[str]:
        """Find the options that have a role.

        Args:
            role: For example `ShapesState`.

        Returns:
            Their names, in the order of the signature.
        """
        return [name for name, option in self.options.items() if role in option.roles]


@dataclass(eq=False)
class Catalogue(Mapping[str, Strategy[Traits]]):
    """A mapping from names to strategies; other packages add methods by an entry-point group.

    Args:
        kind: The key of a recipe under which these methods stand: `merge` or `route`.
        group: The entry-point group.
        traits: A function that makes the traits of a method from the other arguments of `register`.
        reserved: The keys beside the options in a recipe, which no option can have as its name.
        broken: The entry points that cannot be loaded, by name. They are left out.
    """

    kind: str
    group: str
    traits: Callable[..., Traits]
    reserved: tuple[str, ...] = ("method",)
    broken: dict[str, PluginError] = field(default_factory=dict)
    _strategies: dict[str, Strategy[Traits]] = field(default_factory=dict)
    _plugins_loaded: bool = False

    def register(
        self,
        *,
        paper: str,
        needs: tuple[str, ...] = (),
        prepare: Callable[[Any, Options], Any] | None = None,
        keeps_state: bool = True,
        needs_labels: Callable[[Options], bool] = _need_no_labels,
        check: Callable[[Outline, Options], None] | None = None,
        **traits: Any,
    ) -> Callable[[Function], Function]:
        """Register the decorated function under its own name.

        Its keyword-only parameters are the options of the method.

        Args:
            paper: A URL of the paper.
            needs: The materials that the method needs besides the experts' weights, by name.
            prepare: A function `prepare(materials, options) -> state` that makes the method's state.
            keeps_state: Whether the state is stored, pinned in locks and found again.
            needs_labels: A function of the options that returns whether the method reads the labels
                of the data. By default it never does.
            check: A function of an outline and the options that raises MethodError if they do not
                fit, before weights are read.
            **traits: The properties that only methods of this kind have, see `MergeTraits` and
                `RouterTraits`.

        Returns:
            A decorator that returns the function unchanged.

        Raises:
            ValueError: The name is taken, a material is unknown, or an option has no annotation or
                the name of another key.
        """

        def enter(function: Function) -> Function:
            """Add the function to the catalogue."""
            name = function.__name__
            if name in self._strategies:
                raise ValueError(f"the {self.kind} {name!r} is registered already")
            if isinstance(needs, str) or not MATERIALS.issuperset(needs):
                known = ", ".join(sorted(MATERIALS))
                raise ValueError(
                    f"{name}: expected needs= to be a tuple of {known}; found {needs!r}"
                )
            options = read_options(function)
            for key in self.reserved:
                if key in options:
                    raise ValueError(f"{name}: an option cannot be named {key!r}, a key of recipes")
            self._strategies[name] = Strategy(
                name,
                function,
                self.kind,
                paper,
                options,
                self.traits(**traits),
                needs,
                prepare,
                keeps_state and prepare is not None,
                needs_labels,
                check,
            )
            return function

        return enter

    def _load_plugins(self) -> dict[str, Strategy[Traits]]:
        """Import the methods of other packages once, and return all that can be imported."""
        if not self._plugins_loaded:
            self._plugins_loaded = True  # A method may read the catalogue while it is imported.
            self.broken.clear()
            for point in entry_points(group=self.group):
                before = dict(self._strategies)
                try:
                    point.load()
                except BaseException as error:
                    self._strategies = before  # Without what it registered before it failed.
                    if not isinstance(error, Exception | SystemExit):
                        self._plugins_loaded = False
                        raise
                    self.broken[point.name] = report_broken(point, error)
        return self._strategies

    def __getitem__(self, name: str) -> Strategy[Traits]:
        found = self._load_plugins()
        if name not in found and name in self.broken:
            raise self.broken[name]
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load_plugins()))

    def __len__(self) -> int:
        return len(self._load_plugins())
