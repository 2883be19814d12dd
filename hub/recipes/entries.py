"""The entries of a recipe: experts, nested merges, data, and parts."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from experthub.hub.errors import HubError
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Finite, Pattern
from experthub.hub.recipes.method import Method, error_at, read_method
from experthub.hub.registry.expert import Name, Reference
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)


class ExpertUse(Closed):
    """One expert of a recipe.

    Attributes:
        expert: A reference to the expert.
        weight: The factor of its change.
        as_: A name for it in reports.
    """

    expert: str
    weight: Finite = 1.0
    as_: Annotated[Name | None, Field(alias="as")] = None

    @field_validator("expert")
    @classmethod
    def _reference(cls, text: str) -> str:
        """Refuse a reference that cannot be parsed."""
        try:
            Reference.parse(text)
        except HubError as error:
            raise error_at(error.message, "expert", error.hint) from None
        return text


# The None stands outside of the validator that reads a method, so that errors keep their place.
Merge = Annotated[Method | None, BeforeValidator(partial(read_method, "merge"))]
Route = Annotated[Method | None, BeforeValidator(partial(read_method, "route"))]


class NestedMerge(Closed):
    """An expert that is itself a merge of experts, one level deep.

    Attributes:
        merge: The merge.
        experts: The experts that are merged.
        rank: The rank of the result, which is truncated by SVD. None keeps the result exact.
        as_: A name for it in reports.
        weight: The factor of its change.
    """

    merge: Annotated[Method, BeforeValidator(partial(read_method, "merge"))]
    experts: Annotated[list[ExpertUse], Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)] | None = None
    as_: Annotated[Name | None, Field(alias="as")] = None
    weight: Finite = 1.0

    @field_validator("experts", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accept bare references."""
        return parse_uses(value)


def _find_tag(value: Any) -> str:
    """Tell a merge from an expert by its keys."""
    nested = isinstance(value, NestedMerge) or (isinstance(value, dict) and "merge" in value)
    return "<merge>" if nested else "<expert>"


Use = Annotated[
    Annotated[ExpertUse, Tag("<expert>")] | Annotated[NestedMerge, Tag("<merge>")],
    Discriminator(_find_tag),
]


class DataUse(Closed):
    """The data that a method may look at.

    Attributes:
        tasks: References to tasks.
        split: The split of their examples.
        labels: Whether the method may see the right answers.
        shots: Examples of each class.
        limit: The largest number of examples of each task.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    split: Literal["train", "validation", "test"] = "train"
    labels: bool = False
    shots: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _classes(self) -> DataUse:
        """Refuse shots without labels, and a task that is named twice."""
        if self.shots is not None and not self.labels:
            raise ValueError("shots are examples of each class, which needs labels: true")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task is named twice")
        return self


class Part(Closed):
    """A method for some modules.

    Attributes:
        targets: A regular expression that the modules' paths match as a whole.
        merge: The merge. Exactly one of merge and route is set.
        route: The router.
    """

    targets: Pattern
    merge: Merge = None
    route: Route = None

    @property
    def method(self) -> Method:
        """The merge or the router."""
        return choose_method(self.merge, self.route)

    @model_validator(mode="after")
    def _one_way(self) -> Part:
        """Refuse a part with two methods or none, and a method that learns."""
        if self.method.strategy.keeps_state or self.method.strategy.needs_data:
            raise ValueError(f"a part cannot learn: {self.method.method}")
        return self


ONE_WAY = "expected exactly one of merge, route and parts"


def choose_method(*methods: Method | None) -> Method:
    """Return the one method that is set.

    Args:
        *methods: Methods, or None.

    Returns:
        The method.

    Raises:
        ValueError: No method or several methods are set.
    """
    given = [method for method in methods if method is not None]
    if len(given) != 1:
        raise ValueError(ONE_WAY)
    return given[0]


def list_members(entry: ExpertUse | NestedMerge) -> list[ExpertUse]:
    """Return the experts that one entry of a recipe names.

    Args:
        entry: An expert or a nested merge.

    Returns:
        The expert itself, or the experts of the merge.
    """
    return [entry] if isinstance(entry, ExpertUse) else entry.experts


def parse_uses(value: Any) -> Any:
    """Turn bare references into uses of these experts.

    Args:
        value: The value of `experts:` in a recipe.

    Returns:
        The same list, with a mapping instead of each bare reference.
    """
    if not isinstance(value, list):
        return value
    return [{"expert": item} if isinstance(item, str) else item for item in value]
