"""The changes that an expert makes to its base, and the properties of a base that a kind can use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from experthub.hub.bases.names import ModelNames
from experthub.hub.formats.adapter import Adapted
from experthub.hub.formats.added_tokens import NewToken
from experthub.hub.formats.dense_parts import DensePart
from experthub.hub.formats.prompt import PromptShape

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class BaseShapes(Protocol):
    """The properties of a base that a kind can use: names, shapes, and weights one by one."""

    @property
    def name(self) -> str:
        """The name of the base."""
        ...

    @property
    def names(self) -> ModelNames:
        """The names of its parameters in files and in modules."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """The parameters that are not stored, each with the one whose weights it shares."""
        ...

    @property
    def lacks(self) -> frozenset[str]:
        """The parameters that the files lack and that experts bring along."""
        ...

    def read_weight(self, name: str) -> Tensor:
        """Read a parameter, in the dtype in which it is stored."""
        ...


@dataclass(frozen=True)
class Footprint:
    """The changes that an expert makes to its base, as read from the headers of its files.

    Args:
        shapes: The shape of each parameter that the expert changes.
        adapted: The changes of modules, for a low-rank expert.
        gated: The modules that have a gate, each with the name of the gate's tensor.
        skill_tasks: The tasks of an inventory of skills.
        dense: The dense parts of a low-rank expert, by parameter.
        copies: The tensors that only repeat weights of the base, and are not used.
        rows: The number of rows of each parameter that has another vocabulary than the base.
        tokens: The tokens that the expert's tokenizer has beside its vocabulary.
        prompt: The shape of a soft prompt or of a prefix, which changes no parameter.
    """

    shapes: Shapes
    adapted: tuple[Adapted, ...] = ()
    gated: Mapping[str, str] = field(default_factory=dict)
    skill_tasks: tuple[str, ...] = ()
    dense: Mapping[str, tuple[DensePart, ...]] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    tokens: tuple[NewToken, ...] = ()
    prompt: PromptShape | None = None


def count_other_rows(shapes: Mapping[str, tuple[int, ...]], base: BaseShapes) -> dict[str, int]:
    """Count the rows of the parameters that have another vocabulary than the base.

    Args:
        shapes: The shapes of an expert's changes, which were checked.
        base: The base.

    Returns:
        The rows of each such parameter.
    """
    return {n: shape[0] for n, shape in shapes.items() if shape != base.shapes[n]}
