"""Catalogues of methods: a name, a function, its paper, and options read off the signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """The values that a number option may take, for `Annotated[float, Range(0, 1)]`.

    low, high: the ends, both included; None is unbounded.
    """

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.high is None:
            return f">= {self.low}"
        if self.low is None:
            return f"<= {self.high}"
        return f"from {self.low} to {self.high}"

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a method: what a recipe may say and what it means."""

    name: str
    types: tuple[type, ...]
    choices: tuple[str, ...]
    range: Range | None
    default: Any
    required: bool
    description: str

    @property
    def type_name(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        names = {NoneType: "null", list: "list of str"}
        return " | ".join(names.get(t, t.__name__) for t in self.types)

    def check(self, value: object) -> object:
        """The value, an int widened where a float is meant; ValueError says what was expected."""
        if float in self.types and type(value) is int and abs(value) < 1 << 1000:
            value = float(value)
        wrong = type(value) not in self.types or (self.choices and value not in self.choices)
        if wrong or (isinstance(value, list) and {type(item) for item in value} - {str}):
            raise ValueError(f"option {self.name!r}: expected {self.type_name}, found {value!r}")
        if self.range and isinstance(value, int | float) and not self.range.holds(value):
            raise ValueError(f"option {self.name!r}: expected {self.range}, found {value!r}")
        return value


Combine = Literal["outputs", "parameters"]


@dataclass(frozen=True)
class Routing:
    """What a router looks at and gives, in the terms of https://arxiv.org/abs/2408.07057.

    input: what has weights of its own: each `token`, each `example`, each `task`, or nothing.
    depth: who decides: every `module` by itself, by a function of its ExpertStack; or the `model`
    once, by a function of the Pool.  sparse: whether experts may
    get no weight at all, which saves their work.  combines: the ways of mixing that it is defined
    for, the default first.  zero_shot: whether it serves tasks of which nothing was seen.
    """

    input: Literal["token", "example", "task", "nothing"] = "token"
    depth: Literal["module", "model"] = "module"
    sparse: bool = False
    combines: tuple[Combine, ...] = ("outputs", "parameters")
    zero_shot: bool = True

    def __str__(self) -> str:
        of = "every input alike" if self.input == "nothing" else f"each {self.input}"
        by = "at every module" if self.depth == "module" else "once for the model"
        many = "some" if self.sparse else "all"
        unseen = "" if self.zero_shot else "; for tasks of which something was seen"
        ways = " or ".join(self.combines)
        return f"weights for {of}, {by}, of {many} experts; combines {ways}{unseen}"


@dataclass(frozen=True)
class Strategy:
    """A merge or a router under its name in recipes.

    needs: what it needs besides the experts' weights: `gates` of the experts; `activations` of
    their modules or an `index` of examples, both made of the experts' own tasks; `data`.
    order_dependent: permuting the experts may change the result.  whole_model: one tensor of the
    result depends on all tensors of the experts.  dense: its result is, whatever the experts are.
    learns: it finds coefficients, which can be kept.  labelled: whether it needs the data's labels
    with these options.  routing: of a router, what it looks at and gives.
    """

    name: str
    call: Callable[..., Any]
    kind: Literal["merge", "route"]
    paper: str
    options: Mapping[str, Option]
    needs: tuple[str, ...] = ()
    order_dependent: bool = False
    whole_model: bool = False
    dense: bool = False
    learns: bool = False
    labelled: Callable[[Mapping[str, object]], bool] = lambda options: False
    routing: Routing = Routing()

    @property
    def own_tasks(self) -> bool:
        """Whether it looks at examples of the tasks that the experts were trained on."""
        return not {"activations", "index"}.isdisjoint(self.needs)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.call) or "").split("\n\n")[0].replace("\n", " ")

    def bind(self, given: Mapping[str, object]) -> dict[str, object]:
        """The options of a recipe, checked and completed by the defaults.

        Raises KeyError with the name of an unknown option, ValueError for a wrong value.
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


class Catalogue(Mapping[str, Strategy]):
    """Name -> strategy; methods of other packages enter by the entry-point group."""

    def __init__(self, kind: Literal["merge", "route"], group: str) -> None:
        self.kind = kind
        self.group = group
        self._strategies: dict[str, Strategy] = {}
        self._plugins_loaded = False

    def register(
        self,
        *,
        paper: str,
        needs: tuple[str, ...] = (),
        order_dependent: bool = False,
        whole_model: bool = False,
        dense: bool = False,
        learns: bool = False,
        labelled: Callable[[Mapping[str, object]], bool] = lambda options: False,
        routing: Routing = Routing(),
    ) -> Callable[[Function], Function]:
        """Enter the decorated function under its own name; its keyword-only parameters are the options.

        paper: where the method comes from, a URL.  The others are those of `Strategy`.  Raises
        ValueError for a name that is taken.
        """

        def enter(function: Function) -> Function:
            name = function.__name__
            if name in self._strategies:
                raise ValueError(f"the {self.kind} {name!r} is registered already")
            options = _options(function)
            self._strategies[name] = Strategy(
                name,
                function,
                self.kind,
                paper,
                options,
                needs,
                order_dependent=order_dependent,
                whole_model=whole_model,
                dense=dense,
                learns=learns,
                labelled=labelled,
                routing=routing,
            )
            return function

        return enter

    def _loaded(self) -> dict[str, Strategy]:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for point in entry_points(group=self.group):
                point.load()
        return self._strategies

    def __getitem__(self, name: str) -> Strategy:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())


def _options(function: Callable[..., Any]) -> dict[str, Option]:
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    words = _descriptions(inspect.getdoc(function) or "", list(parameters))
    return {
        name: _option(name, hints[name], parameter, words.get(name, ""))
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _option(name: str, hint: Any, parameter: inspect.Parameter, description: str) -> Option:
    limits = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        limits = next((extra for extra in extras if isinstance(extra, Range)), None)
    choices: tuple[str, ...] = ()
    if get_origin(hint) is Literal:
        choices, hint = get_args(hint), str
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = tuple(get_origin(one) or one for one in types)
    required = parameter.default is inspect.Parameter.empty
    default = None if required else parameter.default
    return Option(name, types, choices, limits, default, required, description)


def _descriptions(doc: str, names: Sequence[str]) -> dict[str, str]:
    """`name: words` of a docstring, at the start of a line or after two spaces.

    The words go as far as the next name, a sentence that starts with `Raises`, or a blank line.
    """
    found: dict[str, str] = {}
    start = rf"(?:^|\n|  )(?:({'|'.join(names)}): |(?=Raises ))"
    for paragraph in re.split(r"\n\s*\n", doc):
        _, *parts = re.split(start, paragraph)
        for name, words in zip(parts[::2], parts[1::2], strict=True):
            if name:
                found[name] = " ".join(words.split())
    return found
