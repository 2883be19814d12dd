"""Options of methods: keyword-only parameters with their types, ranges and roles."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The range of a numeric option, as in `Annotated[float, Range(0, 1)]`.

    Args:
        low: The smallest accepted value. None means no limit.
        high: The largest accepted value. None means no limit.
    """

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.high is None:
            return f">= {self.low}"
        if self.low is None:
            return f"<= {self.high}"
        return f"from {self.low} to {self.high}"

    def contains(self, value: float) -> bool:
        """Return whether a value lies in the range.

        Args:
            value: The value of the option.

        Returns:
            True for a value between the limits, both included.
        """
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Role:
    """A role of an option, as in `Annotated[int, ShapesState]`.

    The hub, which runs methods, finds options by their roles and never by their names.

    Args:
        meaning: A sentence about an option with this role.
    """

    meaning: str


ShapesState = Role("the prepared state is valid for one value of the option only")
ShapesExperts = Role("the option changes the experts' weights before they are routed")
RecipeSeed = Role("the recipe's seed is the default")
ExamplesPerTask = Role("the option limits how many examples of each task the method sees")
InputsPerStep = Role("the option is the number of inputs of each task that one step reads")
TaskName = Role("the option fixes the task, so that every input gets the same weights")
EncoderName = Role("the option names a base that embeds texts, on which the result depends")
LateOption = Role(
    "the default value is not part of a digest, because older recipes lack the option"
)


@dataclass(frozen=True)
class Option:
    """A keyword-only parameter of a method, which is a key of a recipe.

    Args:
        name: The key in a recipe.
        types: The Python types of its values.
        choices: The accepted texts, if they are limited.
        range: The accepted numbers, if they are limited.
        default: The value for recipes that do not set the option.
        required: Whether every recipe must set the option.
        description: Its meaning, from the method's docstring.
        roles: The roles by which the caller of the method finds the option.
    """

    name: str
    types: tuple[type, ...]
    choices: tuple[str, ...]
    range: Range | None
    default: Any
    required: bool
    description: str
    roles: frozenset[Role] = frozenset()

    @property
    def type_name(self) -> str:
        """The type as documentation shows it."""
        if self.choices:
            return " | ".join(self.choices)
        names = {NoneType: "null", list: "list of str"}
        return " | ".join(names.get(t, t.__name__) for t in self.types)

    def check(self, value: object) -> object:
        """Check a value, and convert an int to a float for a float option.

        Args:
            value: The value that a recipe sets.

        Returns:
            The value, in the option's type.

        Raises:
            ValueError: The value has another type, or is not among the choices or in the range.
        """
        if float in self.types and type(value) is int and abs(value) < 1 << 1000:
            value = float(value)
        wrong = type(value) not in self.types or (self.choices and value not in self.choices)
        if wrong or (isinstance(value, list) and {type(item) for item in value} - {str}):
            raise ValueError(f"option {self.name!r}: expected {self.type_name}, found {value!r}")
        if self.range and isinstance(value, int | float) and not self.range.contains(value):
            raise ValueError(f"option {self.name!r}: expected {self.range}, found {value!r}")
        return value


def read_options(function: Callable[..., Any]) -> dict[str, Option]:
    """Read the options of a method from its signature and its docstring.

    Args:
        function: The method; its keyword-only parameters are the options.

    Returns:
        The options by name, in the order of the signature.

    Raises:
        ValueError: An option has no annotation.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    words = _read_descriptions(inspect.getdoc(function) or "", list(parameters))
    names = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in names:
        if name not in hints:
            raise ValueError(f"{function.__name__}: the option {name!r} has no type annotation")
    return {n: _read_option(n, hints[n], parameters[n], words.get(n, "")) for n in names}


def _read_option(name: str, hint: Any, parameter: inspect.Parameter, description: str) -> Option:
    """Read one option from its annotation and its default."""
    limits, roles = None, frozenset[Role]()
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        limits = next((extra for extra in extras if isinstance(extra, Range)), None)
        roles = frozenset(extra for extra in extras if isinstance(extra, Role))
    choices: tuple[str, ...] = ()
    if get_origin(hint) is Literal:
        choices, hint = get_args(hint), str
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = tuple(get_origin(one) or one for one in types)
    required = parameter.default is inspect.Parameter.empty
    default = None if required else parameter.default
    return Option(name, types, choices, limits, default, required, description, roles)


def _read_descriptions(doc: str, names: Sequence[str]) -> dict[str, str]:
    """Read `name: description` entries, which end at the next name or at a blank line."""
    found: dict[str, str] = {}
    start = rf"(?:^|\n|  )(?:({'|'.join(names)}): |(?=Raises ))"
    for paragraph in re.split(r"\n\s*\n", doc):
        _, *parts = re.split(start, paragraph)
        for name, words in zip(parts[::2], parts[1::2], strict=True):
            if name:
                found[name] = " ".join(words.split())
    return found
