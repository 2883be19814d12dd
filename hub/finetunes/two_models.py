"""Pair and read the parameters of a base and of a fine-tuned model, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import refuse_missing
from experthub.hub.bases.fingerprint import list_weight_files
from experthub.hub.bases.names import is_covered, join_pieces
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats.safetensors_header import FLOATS, TensorInfo, read_header
from experthub.hub.formats.safetensors_reader import read_tensor
from experthub.hub.kinds.dense_changes import fit_rows
from experthub.hub.progress import Report
from torch import Tensor


@dataclass(frozen=True)
class StoredWeights:
    """The stored parameters of a model; each is read when it is needed.

    Args:
        name: The name of the model in messages.
        shapes: The shapes of the floating-point tensors by name.
        read: A function that reads a tensor by name.
        others: The shapes of all other tensors that the model uses by name.
        tied: A parameter that is not stored -> the stored one that it is tied to.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    others: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]


def open_weights(base: Base) -> StoredWeights:
    """Open the weight files of a model folder.

    Args:
        base: The model.

    Returns:
        Its weights by the names of the model's modules, none of which is read yet.

    Raises:
        HubError: The files hold only a part of a parameter.
    """
    places: dict[str, tuple[Path, TensorInfo]] = {}
    for path in list_weight_files(base.folder):
        for name, info in read_header(path).items():
            places[name] = path, info
    names = base.names
    refuse_missing(base, names.missing)
    sources = names.find_sources(n for n, (_, info) in places.items() if info.dtype in FLOATS)
    taken = {stored for parts in sources.values() for stored, _ in parts} | set(names.unused)
    # Buffers are compared, too: a model with other statistics is not the base with other weights.
    others = {n: i.shape for n, (_, i) in places.items() if i.dtype not in FLOATS or n not in taken}
    shapes = {name: tuple(names.shapes[name]) for name in sources}
    for name, parts in sources.items():
        if not is_covered([piece for _, piece in parts], shapes[name]):
            raise HubError(
                f"{base.name}: the files hold only a part of {name}", "save the whole model again"
            )

    def read(name: str) -> Tensor:
        if name in others:
            return read_tensor(*places[name])
        parts = ((read_tensor(*places[stored]), piece) for stored, piece in sources[name])
        return join_pieces(parts, shapes[name])

    return StoredWeights(base.name, shapes, read, others, base.tied)


@dataclass(frozen=True)
class Pair:
    """A parameter that both models have.

    Args:
        name: The parameter.
        base: The tensor that holds it in the base.
        tuned: The tensor that holds it in the fine-tuned model.
    """

    name: str
    base: str
    tuned: str


def pair_parameters(
    base: StoredWeights,
    tuned: StoredWeights,
    list_vocabulary: Callable[[], Collection[str]] = frozenset,
) -> list[Pair]:
    """Pair the parameters of two models.

    Tied weights are one parameter if both models tie them, and two parameters otherwise.

    Args:
        base: The base's weights.
        tuned: The fine-tuned weights.
        list_vocabulary: A function that returns the parameters whose rows are tokens. Their number
            of rows may differ.

    Returns:
        The pairs, sorted by name.

    Raises:
        HubError: Only one of the models has a parameter, its shapes differ, or tensors that are not
            floating-point numbers differ.
    """
    pairs = [Pair(name, name, name) for name in base.shapes if name in tuned.shapes]
    pairs += [Pair(n, n, at) for n, at in tuned.tied.items() if n in base.shapes]
    pairs += [Pair(n, at, n) for n, at in base.tied.items() if n in tuned.shapes]
    shared = {pair.name for pair in pairs}
    for one, other in ((base, tuned), (tuned, base)):
        alone = [name for name in one.shapes if name not in shared]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise HubError(
                f"{one.name} has {alone[0]}{more}, which {other.name} does not have",
                (suggest_name(alone[0], other.shapes) if len(alone) == 1 else "")
                or "name two models of one architecture",
            )
    for pair in pairs:
        here, there = base.shapes[pair.base], tuned.shapes[pair.tuned]
        resized = here[1:] == there[1:] and here != there and pair.name in list_vocabulary()
        if here != there and not resized:
            raise HubError(
                f"{pair.name} is {list(here)} in {base.name} and {list(there)} in {tuned.name}",
                "name two models of one size; only the number of tokens may differ",
            )
    for name, shape in base.others.items():
        if name in tuned.others and not (
            shape == tuned.others[name] and torch.equal(base.read(name), tuned.read(name))
        ):
            raise HubError(
                f"{name} differs, and is not a parameter in floating point",
                "load both models and save them in float32; quantised weights and buffers have no "
                "difference that an expert can hold",
            )
    return sorted(pairs, key=lambda pair: pair.name)


@dataclass(frozen=True)
class ParameterValues:
    """The values of one parameter, in float32, or in float64 if a model stores float64.

    Args:
        base: The value in the base.
        tuned: The value in the fine-tuned model.
        delta: `tuned - base`.
    """

    base: Tensor
    tuned: Tensor
    delta: Tensor


def read_pair(pair: Pair, base: StoredWeights, tuned: StoredWeights) -> ParameterValues:
    """Read a parameter of both models and subtract.

    Args:
        pair: The parameter.
        base: The base's weights.
        tuned: The fine-tuned weights.

    Returns:
        Both values and their difference. Rows that the base lacks count as zeros.

    Raises:
        IntegrityError: A value is NaN or infinite.
    """
    values = []
    for model, at in ((base, pair.base), (tuned, pair.tuned)):
        value = model.read(at)
        if not bool(torch.isfinite(value).all()):
            raise IntegrityError(
                f"{at} of {model.name} holds NaN or infinity", "train or export the model again"
            )
        values.append(value.to(torch.promote_types(value.dtype, torch.float32)))
    wide = torch.promote_types(values[0].dtype, values[1].dtype)
    before, after = values[0].to(wide), values[1].to(wide)
    before = fit_rows(before, tuple(after.shape))
    return ParameterValues(before, after, after - before)


@dataclass(frozen=True)
class ChangedParameter:
    """A parameter that differs between the models.

    Args:
        pair: The parameter.
        shape: Its shape.
        entries: The number of entries that differ.
    """

    pair: Pair
    shape: tuple[int, ...]
    entries: int

    @property
    def count(self) -> int:
        """The number of all entries."""
        return math.prod(self.shape)


def find_changed(
    pairs: list[Pair], base: StoredWeights, tuned: StoredWeights, report: Report
) -> Iterator[ChangedParameter]:
    """Find the parameters that differ, reading one at a time.

    An output embedding that the base ties and the fine-tuned model does not tie is included even if
    it does not differ. Otherwise the change of the input embedding would apply to it, too.

    Args:
        pairs: The parameters of both models.
        base: The base's weights.
        tuned: The fine-tuned weights.
        report: A progress callback.

    Yields:
        The parameters that differ.
    """
    for i, pair in enumerate(pairs):
        delta = read_pair(pair, base, tuned).delta
        entries = int(torch.count_nonzero(delta))
        untied = pair.name in base.tied and not _is_still_tied(pair, base, tuned)
        if (entries and pair.name not in base.tied) or untied:
            yield ChangedParameter(pair, tuple(delta.shape), entries)
        report("comparing the models", i + 1, len(pairs))


def _is_still_tied(pair: Pair, base: StoredWeights, tuned: StoredWeights) -> bool:
    """Return true if the fine-tuned model holds equal values for two weights that the base ties."""
    at = base.tied[pair.name]
    return torch.equal(tuned.read(pair.tuned), tuned.read(at))
