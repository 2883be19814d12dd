"""The parameters of a base and of a model made from it, side by side and one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from experthub.hub.bases.base import Base, weight_files
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats.safetensors_header import FLOATS, read_header
from experthub.hub.progress import Report
from torch import Tensor


@dataclass(frozen=True)
class StoredWeights:
    """A model's stored parameters, each read when it is asked for.

    shapes: of the tensors of floats.  others: of those that are none, by name.  tied: a parameter
    that is not stored -> the one that it is.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    others: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]


def weights_of(base: Base) -> StoredWeights:
    """What a model folder stores."""
    from safetensors import safe_open

    places: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for path in weight_files(base.folder):
        file = safe_open(path, framework="pt")
        for name, info in read_header(path).items():
            places[name] = file
            (shapes if info.dtype in FLOATS else others)[name] = info.shape

    def read(name: str) -> Tensor:
        tensor: Tensor = places[name].get_tensor(name)
        return tensor

    return StoredWeights(base.name, shapes, read, others, base.tied)


@dataclass(frozen=True)
class Pair:
    """One parameter of both models: its name in the base, and where each keeps it."""

    name: str
    base: str
    tuned: str


def pairs_of(base: StoredWeights, tuned: StoredWeights) -> list[Pair]:
    """Every parameter of both; HubError for one that only one of them has, or of another shape.

    Tied weights are one parameter where both tie them, and two where one of them does not.
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
                f"{one.name} has {alone[0]}{more}, which {other.name} has not",
                suggest_name(alone[0], other.shapes) or "the two must be one architecture",
            )
    for pair in pairs:
        here, there = base.shapes[pair.base], tuned.shapes[pair.tuned]
        if here != there:
            raise HubError(
                f"{pair.name} is {list(here)} in {base.name} and {list(there)} in {tuned.name}",
                "a difference needs equal shapes; was the vocabulary resized?",
            )
    for name, shape in base.others.items():
        if name in tuned.others and not (
            shape == tuned.others[name] and torch.equal(base.read(name), tuned.read(name))
        ):
            raise HubError(
                f"{name} differs, and is no tensor of floats",
                "quantised weights have no difference; load and save both in float32",
            )
    return sorted(pairs, key=lambda pair: pair.name)


@dataclass(frozen=True)
class Read:
    """One parameter: its value in both models, and the difference; in float32, or float64 if stored so."""

    base: Tensor
    tuned: Tensor
    delta: Tensor


def read_pair(pair: Pair, base: StoredWeights, tuned: StoredWeights) -> Read:
    """Both values of a parameter and their difference; IntegrityError for NaN or infinity."""
    values = []
    for model, at in ((base, pair.base), (tuned, pair.tuned)):
        value = model.read(at)
        if not bool(torch.isfinite(value).all()):
            raise IntegrityError(
                f"{at} of {model.name} holds NaN or infinity", "train or export it again"
            )
        values.append(value.to(torch.promote_types(value.dtype, torch.float32)))
    wide = torch.promote_types(values[0].dtype, values[1].dtype)
    before, after = values[0].to(wide), values[1].to(wide)
    return Read(before, after, after - before)


@dataclass(frozen=True)
class Changed:
    """A parameter that differs: its shape, and how many of its entries do."""

    pair: Pair
    shape: tuple[int, ...]
    entries: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def changed_of(
    pairs: list[Pair], base: StoredWeights, tuned: StoredWeights, report: Report
) -> Iterator[Changed]:
    """The parameters that differ, read one by one.

    An output embedding that the base ties and the other model does not is one of them even if it
    does not differ: without it the input's change would be its too.
    """
    for i, pair in enumerate(pairs):
        delta = read_pair(pair, base, tuned).delta
        entries = int(torch.count_nonzero(delta))
        untied = pair.name in base.tied and not _tied_still(pair, base, tuned)
        if (entries and pair.name not in base.tied) or untied:
            yield Changed(pair, tuple(delta.shape), entries)
        report("comparing", i + 1, len(pairs))


def _tied_still(pair: Pair, base: StoredWeights, tuned: StoredWeights) -> bool:
    """Whether a weight that is stored twice is one weight all the same."""
    at = base.tied[pair.name]
    return torch.equal(tuned.read(pair.tuned), tuned.read(at))
