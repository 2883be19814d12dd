"""Task vectors: the changes that an expert makes to the parameters of its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from experthub.merge._catalogue import MethodError
from experthub.merge._delta import Delta, sum_deltas
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskVector(Mapping[str, Delta]):
    """A lazy mapping from parameter names to the changes of these parameters.

    A change is loaded when its name is looked up. A parameter without an entry does not change.

    Args:
        base: The fingerprint of the base.
        load: Parameter name -> function that returns the change.
        seed: The identity of the expert, from which random masks are drawn. The seed of a merge is a
            digest of the experts' seeds.

    Example:
        >>> from experthub.merge import Dense
        >>> change = Dense(torch.ones(2))
        >>> TaskVector("base", {"bias": lambda: change})["bias"].dense()
        tensor([1., 1.])
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
    """Return the base that all task vectors share.

    Args:
        vectors: One or more task vectors.

    Returns:
        The fingerprint of the base.

    Raises:
        ValueError: There is no task vector, or their bases differ.
    """
    bases = {vector.base for vector in vectors}
    if len(bases) != 1:
        raise ValueError(f"expected task vectors of one base, found {sorted(bases)}")
    return bases.pop()


def check_weights(vectors: Sequence[TaskVector], weights: Tensor) -> str:
    """Check that task vectors can be summed with some weights, and return their base.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.

    Returns:
        The fingerprint of the base.

    Raises:
        ValueError: The bases differ, the number of weights is not the number of vectors, or a
            weight is not finite.
    """
    base = find_base(vectors)
    if tuple(weights.shape) != (len(vectors),):
        raise ValueError(f"expected {len(vectors)} weights, found shape {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"expected finite weights, found {weights.tolist()}")
    return base


def normalize_weights(weights: Tensor) -> Tensor:
    """Divide weights by their sum.

    Args:
        weights: The experts' weights `[E]`.

    Returns:
        Weights `[E]` that sum to 1.

    Raises:
        MethodError: The weights sum to zero.
    """
    total = weights.sum()
    if abs(float(total)) < 1e-8:
        raise MethodError(
            f"expected weights with a sum other than 0, found {weights.tolist()}",
            "change the weights so that they do not sum to zero",
        )
    return weights / total


def unite_vectors(
    base: str, vectors: Sequence[TaskVector], compute_change: Callable[[str], Delta]
) -> TaskVector:
    """Build a lazy task vector over all parameters that any of the given vectors changes.

    Args:
        base: The fingerprint of the base.
        vectors: The vectors that give the names. The seed of the result is a digest of their seeds
            and does not depend on their order.
        compute_change: A function that computes the change of a parameter by its name.

    Returns:
        The task vector. `compute_change` is called when a name is looked up.
    """
    names = dict.fromkeys(name for vector in vectors for name in vector)
    seeds = "\n".join(sorted(vector.seed for vector in vectors))
    seed = hashlib.sha256(seeds.encode()).hexdigest()
    return TaskVector(base, {name: partial(compute_change, name) for name in names}, seed)


def combine(vectors: Sequence[TaskVector], weights: Tensor) -> TaskVector:
    """Sum task vectors with weights, `sum_e weights[e] * vectors[e]`, lazily.

    A change of the result is low-rank if the changes that are summed are. A parameter that a
    vector lacks counts as a zero change.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`, finite; gradients flow to them.

    Returns:
        The task vector of the sum.

    Raises:
        ValueError: The bases differ, the number of weights is not the number of vectors, or a
            weight is not finite.

    Example:
        >>> from experthub.merge import Dense
        >>> one = TaskVector("base", {"bias": lambda: Dense(torch.ones(2))})
        >>> combine([one, one], torch.tensor([1.0, 0.5]))["bias"].dense()
        tensor([1.5000, 1.5000])
    """
    base = check_weights(vectors, weights)
    factors: list[float | Tensor] = list(weights) if weights.requires_grad else weights.tolist()

    def compute_change(name: str) -> Delta:
        pairs = zip(vectors, factors, strict=True)
        return sum_deltas([v[name].scaled(w) for v, w in pairs if name in v.load])

    return unite_vectors(base, vectors, compute_change)


def _load_and_apply(change: Callable[[Delta], Delta], vector: TaskVector, name: str) -> Delta:
    """Load the change of one parameter, and apply a function to it."""
    return change(vector[name])


def map_tensors(
    change: Callable[[Delta], Delta], vectors: Sequence[TaskVector]
) -> list[TaskVector]:
    """Apply a function to every change of every task vector, lazily.

    Args:
        change: A function of one change that returns the new one.
        vectors: The task vectors.

    Returns:
        As many task vectors, of the same bases, names and seeds.

    Example:
        >>> from experthub.merge import Dense
        >>> one = TaskVector("base", {"bias": lambda: Dense(torch.ones(2))})
        >>> map_tensors(lambda delta: delta.scaled(2), [one])[0]["bias"].dense()
        tensor([2., 2.])
    """

    def apply(vector: TaskVector) -> TaskVector:
        load = {name: partial(_load_and_apply, change, vector, name) for name in vector}
        return TaskVector(vector.base, load, vector.seed)

    return [apply(vector) for vector in vectors]


def scale_vectors(vectors: Sequence[TaskVector], weights: Tensor) -> list[TaskVector]:
    """Multiply each task vector by its weight, lazily.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.

    Returns:
        The multiplied task vectors. A vector with the weight 1 is returned as it is.
    """

    def scale(vector: TaskVector, factor: float) -> TaskVector:
        if factor == 1:
            return vector
        return map_tensors(lambda delta: delta.scaled(factor), [vector])[0]

    return [scale(v, w) for v, w in zip(vectors, weights.tolist(), strict=True)]
