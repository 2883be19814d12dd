"""A stored expert together with the base that it is checked against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experthub.hub.bases.names import Piece
from experthub.hub.errors import HubError
from experthub.hub.formats.adapter import Adapted
from experthub.hub.formats.added_tokens import (
    EXPERT_TOKENIZER,
    MAX_ADDED,
    NewToken,
    read_added_tokens,
)
from experthub.hub.kinds.footprint import BaseShapes, Shapes
from experthub.hub.kinds.placement import HINT, place_changes

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredExpert:
    """A stored expert together with the base that it is checked against.

    Args:
        name: The name of the expert in errors.
        files: The names of its files.
        base: The base.
        locate: A function that returns the path of a file. The bytes are not verified; they are when
            the changes are loaded.
        verify: A function that hashes a file and returns its path.
        memo: The results of `compute_once` for this base.
        list_vocabulary: A function that returns the base's parameters whose rows are tokens.
    """

    name: str
    files: Collection[str]
    base: BaseShapes
    locate: Callable[[str], Path]
    verify: Callable[[str], Path]
    memo: dict[int, tuple[object, Any]]
    list_vocabulary: Callable[[], Collection[str]] = frozenset

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

    def read_tokens(self) -> tuple[NewToken, ...]:
        """Read the tokens that the expert's tokenizer has beside its vocabulary.

        Returns:
            The tokens, in the order of their ids; none for an expert without such files.

        Raises:
            IntegrityError: A file is malformed.
        """
        files = {file: self.verify(file) for file in EXPERT_TOKENIZER if file in self.files}
        return read_added_tokens(files, self.name) if files else ()

    def fits_vocabulary(self, parameter: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a parameter differs from the base's in the number of its tokens only.

        Args:
            parameter: The name of the parameter.
            shape: Its shape in the expert.

        Returns:
            True if both have tokens as rows and are equal in the other dimensions.
        """
        own = self.base.shapes.get(parameter)
        if own is None or shape[1:] != own[1:] or not 0 < shape[0] <= own[0] + MAX_ADDED:
            return False
        return parameter in self.list_vocabulary()

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
            placed = place_changes(
                adapted, self.base.names, self.name, self.base.name, self.fits_vocabulary
            )
            return {a.parameter: self._find_shape(a) for a in placed}, placed

        return self.compute_once(adapted, compute)

    def _find_shape(self, change: Adapted) -> tuple[int, ...]:
        """Return the shape that a placed change gives to its parameter."""
        own = tuple(self.base.shapes[change.parameter])
        resized = change.piece is None and len(change.shape) == len(own) == 2
        return change.shape if resized and change.shape[1:] == own[1:] else own

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
            if isinstance(place, str) and own != shape and self.fits_vocabulary(place, shape):
                found[place] = shape
                continue
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
