"""Recipes: which base, which experts, and one way to put them together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.files import yaml_files
from experthub.hub.files.patterns import check_pattern
from experthub.hub.files.yaml_files import Closed, Document
from experthub.hub.recipes.method import Method, error_at, method_of
from experthub.hub.registry.expert import Name, Reference, absolute_source
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

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
            raise error_at(error.message, "expert", error.hint) from None
        return text


Pattern = Annotated[str, AfterValidator(check_pattern)]
# None is outside of what reads a method, so that errors keep their place in the file.
Merge = Annotated[Method | None, BeforeValidator(partial(method_of, "merge"))]
Route = Annotated[Method | None, BeforeValidator(partial(method_of, "route"))]


class NestedMerge(Closed):
    """An expert that is itself a merge of experts, one level deep.

    rank: that of the result, by SVD; None keeps it exact.
    """

    merge: Annotated[Method, BeforeValidator(partial(method_of, "merge"))]
    experts: Annotated[list[ExpertUse], Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)] | None = None
    as_: Annotated[Name | None, Field(alias="as")] = None
    weight: Weight = 1.0

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


class Part(Closed):
    """A method for some modules.

    targets: a regular expression that their paths match whole.  Exactly one of merge and route.
    """

    targets: Pattern
    merge: Merge = None
    route: Route = None

    @property
    def method(self) -> Method:
        return one_of(self.merge, self.route)

    @model_validator(mode="after")
    def _one_way(self) -> Part:
        if self.method.strategy.keeps_state or self.method.strategy.needs_data:
            raise ValueError(f"a part learns nothing: {self.method.method}")
        return self


class Recipe(Closed):
    """A base, experts, and exactly one of merge, route and parts.

    targets: a regular expression that module paths must match whole to be changed.  dtype: of the
    composed model, the base's own by default.  data: what a learned merge learns from.
    coefficients: those that it found before, in the place of data.  router: the same of a route: the
    state that was made for it.
    """

    version: Literal[1] = 1
    base: str
    experts: Annotated[list[Use], Field(min_length=1)]
    merge: Merge = None
    route: Route = None
    parts: Annotated[list[Part], Field(min_length=1)] | None = None
    targets: Pattern | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    allow_base_mismatch: bool = False
    data: DataUse | None = None
    coefficients: str | None = None
    router: str | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _uses(cls, value: Any) -> Any:
        return _as_uses(value)

    @model_validator(mode="after")
    def _one_way(self) -> Recipe:
        if self.parts is None:
            one_of(self.merge, self.route)
        elif self.merge or self.route:
            raise ValueError(ONE_WAY)
        elif self.targets:
            raise ValueError("say targets in each of the parts, and not beside them")
        merged = [use.merge for use in self.experts if isinstance(use, NestedMerge)]
        for nested in merged:
            if nested.strategy.needs_data:
                raise ValueError(f"a merge inside of another learns nothing: {nested.method}")
        for method in (*self.methods, *merged):
            method.set_seed(self.seed)
        for method in self.methods:
            self._check_data(method)
        return self

    def _check_data(self, method: Method) -> None:
        """Data for what learns from it, labels where it needs them, and nothing for the others."""
        strategy, name = method.strategy, method.method
        given, (key, other) = self.data is not None, self._keys
        if getattr(self, other):
            raise ValueError(f"{other}: is no key of a {method.kind}: say {key}:")
        if strategy.needs_own_tasks and given:
            raise ValueError(f"{name} looks at the experts' own tasks: remove data")
        if not strategy.needs_data and not strategy.needs_own_tasks:
            if given or self.stored:
                raise ValueError(f"{name} learns nothing: remove data and {key}")
        elif self.stored and (given or not strategy.keeps_state):
            why = f"data and {key} exclude each other"
            raise ValueError(why if given else f"{name} has no {key} to store")
        elif strategy.needs_data and not given and not self.stored:
            raise ValueError(
                f"{name} learns from examples: say data: {{tasks: [...]}}"
                + (f", or {key}: of an earlier run" if strategy.keeps_state else "")
            )
        if self.data and strategy.needs_labels(method.options) and not self.data.labels:
            raise ValueError(f"{method.method} needs right answers here: say labels: true in data")

    @property
    def _keys(self) -> tuple[str, str]:
        """The key of what its method found before, and that of the other kind of method."""
        keys = "coefficients", "router"
        return keys if self.route is None else (keys[1], keys[0])

    @property
    def stored(self) -> str | None:
        """What its method found before, if the recipe names it: coefficients, or a router's state."""
        found: str | None = getattr(self, self._keys[0])
        return found

    @property
    def method(self) -> Method:
        """Of a recipe without parts."""
        return one_of(self.merge, self.route)

    @property
    def methods(self) -> list[Method]:
        return [part.method for part in self.parts] if self.parts else [self.method]

    def of_part(self, part: Part) -> Recipe:
        """The same recipe for the modules of one part, with its method."""
        update = {"parts": None, "merge": part.merge, "route": part.route, "targets": part.targets}
        return self.model_copy(update=update)

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
        document = yaml_files.read(path)
        return cls.of(document, path.resolve().parent)

    @classmethod
    def of(cls, value: Document | dict[str, Any], folder: Path | None = None) -> Recipe:
        """A recipe from plain values; folder is what relative paths are relative to."""
        document = value if isinstance(value, Document) else Document(value, {}, "recipe")
        if not isinstance(document.value, dict):
            document = Document({}, {}, document.name)
        recipe = yaml_files.validate(cls, document)
        near = folder or Path.cwd()
        update: dict[str, Any] = {
            "base": _absolute(recipe.base, near),
            "experts": [_located(use, near) for use in recipe.experts],
        }
        for key in ("coefficients", "router"):
            if getattr(recipe, key):
                update[key] = _absolute(getattr(recipe, key), near)
        if recipe.data:
            tasks = [_absolute(task, near) for task in recipe.data.tasks]
            update["data"] = recipe.data.model_copy(update={"tasks": tasks})
        return recipe.model_copy(update=update)


ONE_WAY = "expected exactly one of merge, route and parts"


def one_of(*methods: Method | None) -> Method:
    """The one that is there; ValueError for none or several."""
    given = [method for method in methods if method is not None]
    if len(given) != 1:
        raise ValueError(ONE_WAY)
    return given[0]


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
        place = _absolute(use.expert, folder)
        return use if place == use.expert else use.model_copy(update={"expert": place})
    return use.model_copy(update={"experts": [_located(one, folder) for one in use.experts]})
