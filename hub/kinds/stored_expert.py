"""A stored expert beside the base that it is checked against, and the changes that it makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from experthub.hub.bases.names import ModelNames, Piece
from experthub.hub.errors import HubError
from experthub.hub.formats.adapter import Adapted
from experthub.hub.kinds.placement import HINT, place_changes

Shapes = dict[str, tuple[int, ...]]
Result = TypeVar("Result")


class BaseShapes(Protocol):
    """The properties of a base that a kind can use: names and shapes, but no weights."""

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


@dataclass(frozen=True)
class Footprint:
    """The changes that an expert makes to its base, as read from the headers of its files.

    Args:
        shapes: The shape of each parameter that the expert changes.
        adapted: The changes of modules, for a low-rank expert.
        gated: The modules that have a gate, each with the name of the gate's tensor.
        skill_tasks: The tasks of an inventory of skills.
    """

    shapes: Shapes
    adapted: tuple[Adapted, ...] = ()
    gated: Mapping[str, str] = field(default_factory=dict)
    skill_tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredExpert:
    """A stored expert together with the base that it is checked against.

    Args:
        name: The name of the expert in errors.
        files: The names of its files.
        base: The base.
        locate: A function that returns the path of a file. The bytes are not verified, so use it
            only to read headers.
        verify: A function that hashes a file and returns its path.
        memo: The results of `compute_once` for this base.
    """

    name: str
    files: Collection[str]
    base: BaseShapes
    locate: Callable[[str], Path]
    verify: Callable[[str], Path]
    memo: dict[int, tuple[object, Any]]

    def compute_once(self, of: object, compute: Callable[[], Result]) -> Result:
        """Compute a function of an object once, if many experts share the object.

        The readers of headers return one object for equal headers, so a thousand experts of equal
        shapes are checked once.

        Args:
            of: The shared object. It is compared by identity.
            compute: A function that returns the result.

        Returns:
            The result of the first call with this object.
        """
        if id(of) not in self.memo:
            self.memo[id(of)] = of, compute()
        found: Result = self.memo[id(of)][1]
        return found

    def check_low_rank(self, adapted: tuple[Adapted, ...]) -> tuple[Shapes, tuple[Adapted, ...]]:
        """Find the parameters that low-rank changes are of, and check their shapes.

        Args:
            adapted: The changes under the names of the expert's file.

        Returns:
            The shape of each parameter that the expert changes, and the changes under the names of
            the base's modules.

        Raises:
            HubError: The base lacks a module, or its weight has another shape.
        """

        def compute() -> tuple[Shapes, tuple[Adapted, ...]]:
            placed = place_changes(adapted, self.base.names, self.name, self.base.name)
            return {a.parameter: tuple(self.base.shapes[a.parameter]) for a in placed}, placed

        return self.compute_once(adapted, compute)

    def check_dense(self, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Check changes of whole parameters against the base.

        Args:
            shapes: The shape of each change under its name in the expert's file.

        Returns:
            The shapes of the parameters that change, those that share a changed weight included.

        Raises:
            HubError: The base lacks a parameter, or it has another shape.
        """
        found: Shapes = {}
        for name, shape in shapes.items():
            place = self.base.names.locate(name)
            pieces = [place] if isinstance(place, str) else place or ()
            own = _find_shape(pieces[0], self.base) if pieces else None
            if own != shape:
                raise HubError(
                    f"{self.name} changes {name} {list(shape)}, but {self.base.name} has "
                    + ("no such parameter" if own is None else f"{list(own)}"),
                    HINT,
                )
            for piece in pieces:
                parameter = piece if isinstance(piece, str) else piece.parameter
                found[parameter] = tuple(self.base.shapes[parameter])
        for use, stored in self.base.tied.items():
            if stored in found:
                found.setdefault(use, found[stored])
        return found


def _find_shape(place: str | Piece, base: BaseShapes) -> tuple[int, ...]:
    """Return the shape of a tensor that stands for a parameter or for a piece of one."""
    return tuple(base.shapes[place]) if isinstance(place, str) else place.shape
