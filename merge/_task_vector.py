"""Task vectors: what an expert adds to the parameters of its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from experthub.merge._delta import Delta, sum_deltas
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskVector(Mapping[str, Delta]):
    """Named changes of one base's parameters, each made only when it is asked for.

    base: the identity of the base (its fingerprint).  load: parameter name -> function that
    makes the delta; an absent name is a zero change.  seed: the identity of the expert, from
    which random masks are drawn; of a merge, a digest of its members' seeds.
    """

    base: str
    load: Mapping[str, Callable[[], Delta]]
    seed: str = ""

    def __getitem__(self, name: str) -> Delta:
        return self.load[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.load)

    def __len__(self) -> int:
        return len(self.load)


def find_base(vectors: Sequence[TaskVector]) -> str:
    """The one base of task vectors; ValueError when they have several."""
    bases = {vector.base for vector in vectors}
    if len(bases) != 1:
        raise ValueError(f"expected task vectors of one base, found {sorted(bases)}")
    return bases.pop()


def check_weights(vectors: Sequence[TaskVector], weights: Tensor) -> str:
    """The base of vectors that can be summed with these weights.

    Raises ValueError for vectors of different bases, and for weights that are not finite or not
    one for each.
    """
    base = find_base(vectors)
    if tuple(weights.shape) != (len(vectors),):
        raise ValueError(f"expected {len(vectors)} weights, found shape {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"expected finite weights, found {weights.tolist()}")
    return base


def unite_vectors(
    base: str, vectors: Sequence[TaskVector], at: Callable[[str], Delta]
) -> TaskVector:
    """A task vector whose change of each parameter that any vector names is made by `at`.

    Its seed is a digest of theirs, whatever their order.
    """
    names = dict.fromkeys(name for vector in vectors for name in vector)
    seeds = "\n".join(sorted(vector.seed for vector in vectors))
    seed = hashlib.sha256(seeds.encode()).hexdigest()
    return TaskVector(base, {name: partial(at, name) for name in names}, seed)


def combine(vectors: Sequence[TaskVector], weights: Tensor) -> TaskVector:
    """The weighted sum of task vectors, `sum_e weights[e] * vectors[e]`, made lazily.

    weights: `[E]`, finite; gradients flow to it.  A parameter that a vector lacks is a zero
    change there.  Raises ValueError for vectors of different bases or a wrong number of weights.
    """
    base = check_weights(vectors, weights)
    factors: list[float | Tensor] = list(weights) if weights.requires_grad else weights.tolist()

    def at(name: str) -> Delta:
        pairs = zip(vectors, factors, strict=True)
        return sum_deltas([v[name].scaled(w) for v, w in pairs if name in v.load])

    return unite_vectors(base, vectors, at)


def _changed(change: Callable[[Delta], Delta], vector: TaskVector, name: str) -> Delta:
    return change(vector[name])


def map_tensors(
    change: Callable[[Delta], Delta], vectors: Sequence[TaskVector]
) -> list[TaskVector]:
    """Each vector with `change` applied to every one of its deltas, lazily."""

    def changed(vector: TaskVector) -> TaskVector:
        load = {name: partial(_changed, change, vector, name) for name in vector}
        return TaskVector(vector.base, load, vector.seed)

    return [changed(vector) for vector in vectors]


def scale_vectors(vectors: Sequence[TaskVector], weights: Tensor) -> list[TaskVector]:
    """Each vector times its weight, lazily; weights that are 1 leave it as it is."""

    def scaled(vector: TaskVector, factor: float) -> TaskVector:
        if factor == 1:
            return vector
        return map_tensors(lambda delta: delta.scaled(factor), [vector])[0]

    return [scaled(v, w) for v, w in zip(vectors, weights.tolist(), strict=True)]
