"""Recipes: a base, experts, and one way to combine them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import NotFoundError
from experthub.hub.files import yaml_files
from experthub.hub.files.yaml_files import Closed, Document
from experthub.hub.formats.records import Pattern
from experthub.hub.recipes.entries import (
    ONE_WAY,
    DataUse,
    ExpertUse,
    Merge,
    NestedMerge,
    Part,
    Route,
    Use,
    choose_method,
    list_members,
    parse_uses,
)
from experthub.hub.recipes.method import Method
from experthub.hub.registry.expert import Reference, make_source_absolute
from experthub.merge import EncoderName
from pydantic import Field, field_validator, model_validator

STATE_KEYS = ("coefficients", "router")  # The keys of the states of a merge and of a route.


class Recipe(Closed):
    """A base, experts, and exactly one of merge, route and parts.

    Attributes:
        version: The version of the format.
        base: A reference to the base.
        experts: The experts, and merges of experts.
        merge: The merge, for one set of weights.
        route: The router, for weights that depend on the input.
        parts: Methods for disjoint sets of modules.
        targets: A regular expression; only modules whose path it matches as a whole are changed.
        dtype: The dtype of the composed model. None means the dtype of the base.
        seed: The seed of methods that draw random numbers.
        allow_base_mismatch: Whether experts of another base are accepted.
        data: The data that a method learns from.
        coefficients: Stored coefficients of a merge, instead of data.
        router: A stored state of a router, instead of data.
        dense_parts: The expert whose dense parts (heads, embeddings, biases) the model takes.
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
    dense_parts: str | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _uses(cls, value: Any) -> Any:
        """Accept bare references."""
        return parse_uses(value)

    @model_validator(mode="after")
    def _one_way(self) -> Recipe:
        """Refuse a recipe with several ways to combine its experts, or with none."""
        if self.parts is None:
            choose_method(self.merge, self.route)
        elif self.merge or self.route:
            raise ValueError(ONE_WAY)
        elif self.targets:
            raise ValueError("set targets in each of the parts, and not beside them")
        elif given := [key for key in STATE_KEYS if getattr(self, key)]:
            raise ValueError(f"parts take no state; remove {given[0]}:")
        merged = [use.merge for use in self.experts if isinstance(use, NestedMerge)]
        for nested in merged:
            if nested.strategy.needs_data:
                raise ValueError(f"a merge inside of another cannot learn: {nested.method}")
        for method in (*self.methods, *merged):
            method.set_seed(self.seed)
        for method in self.methods:
            self._check_data(method)
        return self

    def _check_data(self, method: Method) -> None:
        """Require data and labels for a method that needs them, and refuse them for others."""
        strategy, name = method.strategy, method.method
        given, key = self.data is not None, self.state_key
        (other,) = {*STATE_KEYS} - {key}
        if getattr(self, other):
            raise ValueError(f"{other}: does not belong to a {method.kind}; use {key}:")
        if strategy.needs_own_tasks and given:
            raise ValueError(f"{name} looks at the experts' own tasks; remove data")
        if not strategy.needs_data and not strategy.needs_own_tasks:
            if given or self.stored:
                raise ValueError(f"{name} learns nothing; remove data and {key}")
        elif self.stored and (given or not strategy.keeps_state):
            why = f"data and {key} exclude each other"
            raise ValueError(why if given else f"{name} keeps no state; remove {key}:")
        elif strategy.needs_data and not given and not self.stored:
            raise ValueError(
                f"{name} learns from examples; set data: {{tasks: [...]}}"
                + (f", or {key}: of an earlier run" if strategy.keeps_state else "")
            )
        if self.data and strategy.needs_labels(method.options) and not self.data.labels:
            raise ValueError(f"{method.method} needs right answers here; set labels: true in data")

    @property
    def state_key(self) -> str:
        """The key that names a stored state of the method."""
        return STATE_KEYS[self.route is not None]

    @property
    def stored(self) -> str | None:
        """A reference to the method's stored state, if the recipe names one."""
        found: str | None = getattr(self, self.state_key)
        return found

    @property
    def method(self) -> Method:
        """The method of a recipe without parts."""
        return choose_method(self.merge, self.route)

    @property
    def methods(self) -> list[Method]:
        """The method of each part, or the one method."""
        return [part.method for part in self.parts] if self.parts else [self.method]

    @property
    def encoder_names(self) -> list[str]:
        """The names of the bases that embed texts for the methods."""
        return [n for m in self.methods for n in m.find_options(EncoderName).values() if n]

    def of_part(self, part: Part) -> Recipe:
        """Return the same recipe for the modules of one part, with its method.

        Args:
            part: One of the parts.

        Returns:
            A recipe without parts.
        """
        update = {"parts": None, "merge": part.merge, "route": part.route, "targets": part.targets}
        return self.model_copy(update=update)

    @property
    def uses(self) -> list[ExpertUse]:
        """The experts in order, including the experts of nested merges."""
        return [use for entry in self.experts for use in list_members(entry)]

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a recipe file; relative folders in it are relative to the file.

        Args:
            path: The file.

        Returns:
            The recipe.

        Raises:
            NotFoundError: There is no such file.
            UsageError: The file is malformed; the message names the file and the line.
        """
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(
                f"there is no recipe {path}", "check the path; docs/recipes.md shows a first recipe"
            )
        document = yaml_files.read(path)
        return cls.of(document, path.resolve().parent)

    @classmethod
    def of(cls, value: Document | dict[str, Any], folder: Path | None = None) -> Recipe:
        """Make a recipe from plain values.

        Args:
            value: The values of a recipe file.
            folder: The folder that relative paths are relative to; the current one by default.

        Returns:
            The recipe.

        Raises:
            UsageError: The values are not a recipe.
        """
        document = value if isinstance(value, Document) else Document(value, {}, "recipe")
        if not isinstance(document.value, dict):
            document = Document({}, {}, document.name)
        recipe = yaml_files.validate(cls, document)
        near = folder or Path.cwd()
        update: dict[str, Any] = {
            "base": _make_absolute(recipe.base, near),
            "experts": [_make_use_absolute(use, near) for use in recipe.experts],
        }
        for key in STATE_KEYS:
            if getattr(recipe, key):
                update[key] = _make_absolute(getattr(recipe, key), near)
        if recipe.data:
            tasks = [_make_absolute(task, near) for task in recipe.data.tasks]
            update["data"] = recipe.data.model_copy(update={"tasks": tasks})
        return recipe.model_copy(update=update)


def _make_absolute(text: str, folder: Path) -> str:
    """Make a relative folder absolute; return any other reference unchanged."""
    if text.startswith(("./", "../", "file:")) or text in (".", ".."):
        source = make_source_absolute(text, folder)
        return source if Reference.parse(source).member else source.removeprefix("file:")
    return text


def _make_use_absolute(use: ExpertUse | NestedMerge, folder: Path) -> ExpertUse | NestedMerge:
    """Make the folders that an entry refers to absolute."""
    if isinstance(use, ExpertUse):
        place = _make_absolute(use.expert, folder)
        return use if place == use.expert else use.model_copy(update={"expert": place})
    return use.model_copy(
        update={"experts": [_make_use_absolute(one, folder) for one in use.experts]}
    )
