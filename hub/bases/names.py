"""The names of a base's parameters: those of the model's modules, and those in files.

Transformers renames weights when it loads them, and fuses or splits some. Experts are checked and
applied by the names of the modules. Their own files may have either names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
# Start in the stored tensor, start in the parameter, length.
Run = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """The place of a stored tensor in a parameter of the model.

    Args:
        parameter: The name of the parameter.
        shape: The shape of the stored tensor.
        fixed: Axes of the parameter that the stored tensor lacks, each with a position.
        axes: For each axis of the stored tensor, the axis of the parameter and its runs. None
            stands for an axis of length 1 that the parameter does not have.
    """

    parameter: str
    shape: Shape
    fixed: tuple[tuple[int, int], ...] = ()
    axes: tuple[tuple[int, tuple[Run, ...]] | None, ...] = ()

    @property
    def count(self) -> int:
        """The number of entries that the piece covers."""
        found = 1
        for axis in self.axes:
            found *= 1 if axis is None else sum(length for _, _, length in axis[1])
        return found

    def write(self, stored: Tensor, into: Tensor) -> None:
        """Write a stored tensor into a parameter.

        Args:
            stored: A tensor of the stored shape.
            into: A tensor of the parameter's shape, which is changed.
        """
        for source, target in self._match(stored, into):
            target.copy_(source)

    def read(self, parameter: Tensor, into: Tensor) -> None:
        """Write a part of a parameter into a stored tensor, as `write` does the other way round.

        Args:
            parameter: A tensor of the parameter's shape.
            into: A tensor of the stored shape, which is changed.
        """
        for target, source in self._match(into, parameter):
            target.copy_(source)

    def _match(self, stored: Tensor, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """List the views of a stored tensor and of a parameter that have the same entries."""
        for axis, position in sorted(self.fixed, reverse=True):
            parameter = parameter.select(axis, position)
        for number in reversed(range(len(self.axes))):
            if self.axes[number] is None:
                stored = stored.select(number, 0)
        kept = [axis for axis in self.axes if axis is not None]
        places = sorted(axis for axis, _ in kept)
        order = [places.index(axis) for axis, _ in kept]
        yield from _match_runs(stored, parameter.permute(order), [runs for _, runs in kept])

    def record(self) -> list[Any]:
        """Return the fields as plain values, for a JSON file.

        Returns:
            The values, in the order of the fields.
        """
        return [self.parameter, list(self.shape), self.fixed, self.axes]

    @classmethod
    def parse(cls, record: list[Any]) -> Piece:
        """Make a piece from the values that `record` returned.

        Args:
            record: The values.

        Returns:
            The piece.
        """
        parameter, shape, fixed, axes = record
        parsed = [
            None if axis is None else (axis[0], tuple((r[0], r[1], r[2]) for r in axis[1]))
            for axis in axes
        ]
        return cls(parameter, tuple(shape), tuple((a, p) for a, p in fixed), tuple(parsed))


def _match_runs(
    stored: Tensor, parameter: Tensor, runs: list[tuple[Run, ...]], axis: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """List the views for the runs of all axes from `axis` on."""
    if axis == len(runs):
        yield stored, parameter
        return
    for begin, start, length in runs[axis]:
        part = stored.narrow(axis, begin, length), parameter.narrow(axis, start, length)
        yield from _match_runs(*part, runs, axis + 1)


def join_pieces(parts: Iterable[tuple[Tensor, Piece | None]], shape: Shape) -> Tensor:
    """Join stored tensors to a parameter.

    Args:
        parts: Tensors with their pieces. A tensor without a piece is the whole parameter.
        shape: The shape of the parameter.

    Returns:
        The parameter, with zeros where no piece is.

    Raises:
        ValueError: There is no tensor.
    """
    found: Tensor | None = None
    for tensor, piece in parts:
        if piece is None:
            return tensor
        if found is None:
            found = tensor.new_zeros(shape)
        piece.write(tensor, found)
    if found is None:
        raise ValueError("expected at least one tensor, found none")
    return found


def is_covered(pieces: Iterable[Piece | None], shape: Shape) -> bool:
    """Tell whether pieces cover every entry of a parameter.

    Args:
        pieces: The pieces of the parameter; None for the whole of it.
        shape: Its shape.

    Returns:
        True if no entry is left out.
    """
    count = math.prod(shape)
    return sum(count if piece is None else piece.count for piece in pieces) == count


# A parameter that a stored tensor is, or the pieces that it becomes.
Place = str | tuple[Piece, ...]


@dataclass(frozen=True)
class ModelNames:
    """The parameters of a base's model under the names of its modules.

    Args:
        shapes: The shape of each parameter, in the model's order; tied ones included.
        tied: The output embedding, if it is not stored, with the parameter whose weights it shares.
        linear: The linear modules, each with whether its weight is stored as `[I, O]` (Conv1D).
        main_input: The name of the model's first input, such as `input_ids`.
        transposed: The modules that hold stacks of matrices as `[N, I, O]`.
        moved: The places of the stored tensors that are not parameters under their own names.
        aliases: The places of tensors that older files of this architecture have.
        missing: The weights that the files lack.
        unused: The stored weights that the model does not use.
        uncalled: The linear modules that the model never calls, and whose weight it reads in a way that
            no product with it could replace.
        find_renamed: A function that applies transformers' rules to a name that no file has.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    linear: Mapping[str, bool]
    main_input: str
    transposed: frozenset[str]
    moved: Mapping[str, Place]
    aliases: Mapping[str, Place]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    uncalled: frozenset[str]
    find_renamed: Callable[[str], Sequence[str]] = field(compare=False)

    def locate(self, name: str) -> Place | None:
        """Find the parameter that a name in an expert's file stands for.

        Args:
            name: A name of a parameter, as a module or a file of this architecture has it.

        Returns:
            The name of the parameter, or the pieces of parameters that transformers would load such
            a tensor into. None if it would load the tensor nowhere.
        """
        found = self._find(name)
        for other in [] if found else self.find_renamed(name):
            found = found or self._find(other)
        return found

    def _find(self, name: str) -> Place | None:
        """Find a name without renaming it."""
        return name if name in self.shapes else self.moved.get(name) or self.aliases.get(name)

    def locate_module(self, module: str) -> str | None:
        """Find the module that a path in an expert's file stands for.

        Args:
            module: The path of a module with a weight.

        Returns:
            The path in the model; None if there is no such module, or if it is a part of one.
        """
        found = self.locate(f"{module}.weight")
        return found.removesuffix(".weight") if isinstance(found, str) else None

    def find_sources(self, stored: Iterable[str]) -> dict[str, list[tuple[str, Piece | None]]]:
        """Find the stored tensors that make up each parameter.

        Args:
            stored: The names of the tensors in the base's files.

        Returns:
            For each parameter, its tensors with their pieces. A single tensor without a piece is
            the parameter as it is.
        """
        found: dict[str, list[tuple[str, Piece | None]]] = {}
        for name in stored:
            place = self.moved.get(name, name)
            if isinstance(place, str):
                if place in self.shapes:
                    found.setdefault(place, []).append((name, None))
                continue
            for piece in place:
                found.setdefault(piece.parameter, []).append((name, piece))
        return found

    def record(self) -> dict[str, Any]:
        """Return the fields as plain values, for a JSON file.

        Returns:
            The values by the names of the fields.
        """
        return {
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "tied": dict(self.tied),
            "linear": dict(self.linear),
            "main_input": self.main_input,
            "transposed": sorted(self.transposed),
            "moved": {name: _record_place(place) for name, place in self.moved.items()},
            "aliases": {name: _record_place(place) for name, place in self.aliases.items()},
            "missing": list(self.missing),
            "unused": list(self.unused),
            "uncalled": sorted(self.uncalled),
        }

    @classmethod
    def parse(
        cls, record: dict[str, Any], find_renamed: Callable[[str], Sequence[str]]
    ) -> ModelNames:
        """Make the names from the values that `record` returned.

        Args:
            record: The values.
            find_renamed: A function that applies transformers' rules to a name that no file has.

        Returns:
            The names.
        """
        return cls(
            shapes={name: tuple(shape) for name, shape in record["shapes"]},
            tied=record["tied"],
            linear=record["linear"],
            main_input=record["main_input"],
            transposed=frozenset(record["transposed"]),
            moved={name: _parse_place(place) for name, place in record["moved"].items()},
            aliases={name: _parse_place(place) for name, place in record["aliases"].items()},
            missing=tuple(record["missing"]),
            unused=tuple(record["unused"]),
            uncalled=frozenset(record["uncalled"]),
            find_renamed=find_renamed,
        )


def _record_place(place: Place) -> Any:
    """Return a place as plain values."""
    return place if isinstance(place, str) else [piece.record() for piece in place]


def _parse_place(record: Any) -> Place:
    """Return the place that `_record_place` described."""
    return record if isinstance(record, str) else tuple(Piece.parse(piece) for piece in record)
