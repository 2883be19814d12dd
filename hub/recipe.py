"""Recipes: which base, which experts, and one way to put them together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from experthub.hub import _yaml
from experthub.hub._patterns import checked_pattern
from experthub.hub._yaml import Closed, Document
from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.expert import Name, Reference, absolute_source
from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from experthub.merge import Catalogue, Strategy

Weight = Annotated[float, Field(allow_inf_nan=False)]


class ExpertUse(Closed):
    """One expert of a recipe: a reference, how much of it, and a name for it in reports."""

    expert: str
    weight: Weight = 1.0
    as_: Annotated[Name | None, Field(alias="as")] = None

    @field_validator("expert")
    @classmethod
    def _reference(cls, text: str) -> str:
        try:
            Reference.parse(text)
        except HubError as error:
            raise _error(error.message, "expert", error.hint) from None
        return text


class Method(Closed):
    """A merge or a router with its options, checked against the method's signature."""

    kind: Literal["merge", "route"]
    method: str
    combine: Literal["outputs", "parameters"] = "outputs"
    kernel: Literal["auto", "all", "copied", "sampled"] = "auto"
    options: dict[str, Any] = {}

    @property
    def strategy(self) -> Strategy:
        """The catalogue's entry."""
        return _catalogue(self.kind)[self.method]


def _catalogue(kind: Literal["merge", "route"]) -> Catalogue:
    from experthub.merge import merges
    from experthub.routing import routers

    return merges if kind == "merge" else routers


def _error(message: str, key: str, hint: str) -> PydanticCustomError:
    """An error at one key of the mapping that is being read."""
    context = {"message": message, "key": key, "hint": hint}
    return PydanticCustomError("hub_error", "{message}", context)


def _method(kind: Literal["merge", "route"], value: Any) -> Method:
    catalogue = _catalogue(kind)
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise PydanticCustomError("method", "expected a mapping with the key 'method'")
    given = dict(value)
    name = given.pop("method")
    if name not in catalogue:
        other = _catalogue("route" if kind == "merge" else "merge")
        hint = _yaml.did_you_mean(name, catalogue)
        if name in other:
            hint = f"{name} is a {other.kind}: write it under '{other.kind}:'"
        raise _error(f"unknown {kind} method {name!r}", "method", hint)
    combine: Any = given.pop("combine", "outputs") if kind == "route" else "outputs"
    kernel: Any = given.pop("kernel", "auto") if kind == "route" else "auto"
    if kernel not in get_args(Method.model_fields["kernel"].annotation):
        raise _error(
            f"expected auto, all, copied or sampled, found {kernel!r}",
            "kernel",
            "auto measures which is the fastest",
        )
    if combine not in ("outputs", "parameters"):
        raise _error(
            f"expected outputs or parameters, found {combine!r}",
            "combine",
            "outputs mixes B A x, parameters mixes the B and the A",
        )
    strategy = catalogue[name]
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
        raise _error(f"{name}: {error}", key, f"see hub methods {name}") from None
    if "seed" not in given:
        options.pop("seed", None)  # the recipe's own, which is not known here
    return Method(kind=kind, method=name, combine=combine, kernel=kernel, options=options)


class NestedMerge(Closed):
    """An expert that is itself a merge of experts, one level deep.

    rank: that of the result, by SVD; None keeps it exact.
    """

    merge: Method
    experts: Annotated[list[ExpertUse], Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)] | None = None
    as_: Annotated[Name | None, Field(alias="as")] = None
    weight: Weight = 1.0

    @field_validator("merge", mode="before")
    @classmethod
    def _merge(cls, value: Any) -> Method:
        return _method("merge", value)

    @field_validator("experts", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _as_uses(value)


def _use_kind(value: Any) -> str:
    nested = isinstance(value, NestedMerge) or (isinstance(value, dict) and "merge" in value)
    return "<merge>" if nested else "<expert>"


Use = Annotated[
    Annotated[ExpertUse, Tag("<expert>")] | Annotated[NestedMerge, Tag("<merge>")],
    Discriminator(_use_kind),
]


class DataUse(Closed):
    """What a learned merge may look at.

    tasks: references.  split: of their examples.  labels: whether it may see the right answers.
    shots: examples of each class.  limit: examples of each task, at most.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    split: Literal["train", "validation", "test"] = "train"
    labels: bool = False
    shots: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _classes(self) -> DataUse:
        if self.shots is not None and not self.labels:
            raise ValueError("shots are examples of each class, which needs labels: true")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task stands twice")
        return self


class Recipe(Closed):
    """A base, experts, and exactly one of merge and route.

    targets: a regular expression that module paths must match whole to be changed.  dtype: of the
    composed model, the base's own by default.  data: what a learned merge learns from.
    coefficients: those that it found before, in the place of data.
    """

    version: Literal[1] = 1
    base: str
    experts: Annotated[list[Use], Field(min_length=1)]
    merge: Method | None = None
    route: Method | None = None
    targets: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    allow_base_mismatch: bool = False
    data: DataUse | None = None
    coefficients: str | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _uses(cls, value: Any) -> Any:
        return _as_uses(value)

    @field_validator("merge", mode="before")
    @classmethod
    def _merge(cls, value: Any) -> Method | None:
        return None if value is None else _method("merge", value)

    @field_validator("route", mode="before")
    @classmethod
    def _route(cls, value: Any) -> Method | None:
        return None if value is None else _method("route", value)

    @field_validator("targets")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        return checked_pattern(value) if value else value

    @model_validator(mode="after")
    def _one_way(self) -> Recipe:
        if (self.merge is None) == (self.route is None):
            raise ValueError("expected exactly one of merge and route")
        merged = [use.merge for use in self.experts if isinstance(use, NestedMerge)]
        for nested in merged:
            if "data" in nested.strategy.needs:
                raise ValueError(f"a merge inside of another learns nothing: {nested.method}")
        for method in (self.method, *merged):
            if "seed" in method.strategy.options:
                method.options.setdefault("seed", self.seed)
        self._check_data(self.method)
        return self

    def _check_data(self, method: Method) -> None:
        """Data for what learns from it, labels where it needs them, and nothing for the others."""
        strategy = method.strategy
        given = self.data is not None
        if "data" not in strategy.needs:
            if given or self.coefficients:
                raise ValueError(f"{method.method} learns nothing: remove data and coefficients")
        elif self.coefficients and (given or not strategy.learns):
            why = "data and coefficients exclude each other"
            raise ValueError(why if given else f"{method.method} has no coefficients to store")
        elif not given and not self.coefficients:
            raise ValueError(
                f"{method.method} learns from examples: say data: {{tasks: [...]}}"
                + (", or coefficients: of an earlier run" if strategy.learns else "")
            )
        if self.data and strategy.labelled(method.options) and not self.data.labels:
            raise ValueError(f"{method.method} needs right answers here: say labels: true in data")

    @property
    def learned(self) -> bool:
        """Whether its method looks at data, or at coefficients that came of it."""
        return "data" in self.method.strategy.needs

    @property
    def method(self) -> Method:
        method = self.merge or self.route
        if method is None:
            raise ValueError("expected exactly one of merge and route")
        return method

    @property
    def uses(self) -> list[ExpertUse]:
        """The experts, those of nested merges included, in order."""
        return [use for entry in self.experts for use in members_of(entry)]

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a recipe file; relative folders in it are relative to it.

        Raises NotFoundError for no file, UsageError with file and line for anything wrong in it.
        """
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(f"there is no recipe {path}", "see docs/recipes.md for a first one")
        document = _yaml.read(path)
        return cls.of(document, path.resolve().parent)

    @classmethod
    def of(cls, value: Document | dict[str, Any], folder: Path | None = None) -> Recipe:
        """A recipe from plain values; folder is what relative paths are relative to."""
        document = value if isinstance(value, Document) else Document(value, {}, "recipe")
        if not isinstance(document.value, dict):
            document = Document({}, {}, document.name)
        recipe = _yaml.validated(cls, document)
        near = folder or Path.cwd()
        update: dict[str, Any] = {
            "base": _absolute(recipe.base, near),
            "experts": [_located(use, near) for use in recipe.experts],
        }
        if recipe.coefficients:
            update["coefficients"] = _absolute(recipe.coefficients, near)
        if recipe.data:
            tasks = [_absolute(task, near) for task in recipe.data.tasks]
            update["data"] = recipe.data.model_copy(update={"tasks": tasks})
        return recipe.model_copy(update=update)


def members_of(entry: ExpertUse | NestedMerge) -> list[ExpertUse]:
    """The experts that one entry of a recipe names."""
    return [entry] if isinstance(entry, ExpertUse) else entry.experts


def _as_uses(value: Any) -> Any:
    """A bare reference stands for a use of that expert."""
    if not isinstance(value, list):
        return value
    return [{"expert": item} if isinstance(item, str) else item for item in value]


def _absolute(text: str, folder: Path) -> str:
    if text.startswith(("./", "../", "file:")) or text in (".", ".."):
        source = absolute_source(text, folder)
        return source if Reference.parse(source).member else source.removeprefix("file:")
    return text


def _located(use: ExpertUse | NestedMerge, folder: Path) -> ExpertUse | NestedMerge:
    if isinstance(use, ExpertUse):
        return use.model_copy(update={"expert": _absolute(use.expert, folder)})
    inner = [u.model_copy(update={"expert": _absolute(u.expert, folder)}) for u in use.experts]
    return use.model_copy(update={"experts": inner})
