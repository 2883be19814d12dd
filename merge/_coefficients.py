"""Coefficients of task vectors by block of parameters, and the merge that they make.

Shapes: E experts, B blocks, K groups of a partition, P entries of a parameter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from experthub.merge._catalogue import MethodError, Options, Outline
from experthub.merge._delta import Delta, Dense, LowRank, sum_deltas
from experthub.merge._task_vector import TaskVector, find_base, unite_vectors
from torch import Tensor

Combine = Literal["outputs", "parameters"]
LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")  # as far as the first number in a parameter's path


def assign_blocks(names: Iterable[str], granularity: str) -> dict[str, str]:
    """Parameter name -> the label of its block.

    granularity: `task`, one block; `layer` and `partition`, each parameter tensor by itself, as
    the papers mean it; `block`, a transformer layer, and by module what is outside of them; or a
    regular expression: names in which it finds the same text (its first group, if it has one)
    share a block, and all in which it finds nothing share another.
    """
    if granularity == "task":
        return dict.fromkeys(names, "model")
    if granularity in ("layer", "partition"):
        return {name: name for name in names}
    if granularity == "block":
        found = {name: LAYER.match(name) for name in names}
        return {n: m.group() if m else n.rpartition(".")[0] or n for n, m in found.items()}
    try:
        pattern = re.compile(granularity)
    except re.error as error:
        raise ValueError(
            f"option 'granularity': expected task, layer, block, partition or a regular "
            f"expression, found {granularity!r}: {error}"
        ) from None
    first = min(pattern.groups, 1)
    matches = {name: pattern.search(name) for name in names}
    return {n: (m.group(first) or "rest") if m else "rest" for n, m in matches.items()}


def check_granularity(outline: Outline, options: Options) -> None:
    """Raise MethodError for a granularity that cannot be used.

    Args:
        outline: The experts and the parameters that they change.
        options: The options of the method; `granularity` is among them.

    Raises:
        MethodError: The granularity is neither a name nor a regular expression.
    """
    try:
        assign_blocks(outline.parameters, options["granularity"])
    except ValueError as error:
        raise MethodError(str(error), "write it simpler, or use a name") from None


def make_generator(*key: object) -> torch.Generator:
    """A random generator that depends on nothing but the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_groups(name: str, count: int, groups: int, seed: int) -> Tensor:
    """The group `[P]` of every entry of a parameter: random, the same for a name and a seed."""
    drawn = make_generator("partition", seed, name)
    return torch.randint(groups, (count,), generator=drawn, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """How much of each expert goes into each block of parameters.

    values: `[E, B]`, or `[E, B, K]` for a partition of every parameter's entries into K groups.
    blocks: their labels, in order.  combine: `outputs` sums the changes; `parameters` sums the
    factors of low-rank ones, `(sum c s B)(sum c A)`.  seed: of the partition.  history: the loss
    at each step of learning.  objective: what learning minimised.
    """

    values: Tensor
    blocks: tuple[str, ...]
    granularity: str
    combine: Combine = "outputs"
    seed: int = 0
    history: tuple[float, ...] = ()
    objective: str | None = None

    def __post_init__(self) -> None:
        if self.values.ndim not in (2, 3) or self.values.shape[1] != len(self.blocks):
            raise ValueError(
                f"expected coefficients [experts, {len(self.blocks)} blocks], "
                f"found {list(self.values.shape)}"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError("expected finite coefficients")


def zero_coefficients(experts: int) -> Coefficients:
    """Return zero coefficients `[E, 1]`: one for each expert as a whole.

    Args:
        experts: The number of experts E.

    Returns:
        Coefficients of one block, in double precision.
    """
    return Coefficients(torch.zeros(experts, 1, dtype=torch.float64), ("model",), "task")


def compose_vector(vectors: Sequence[TaskVector], coefficients: Coefficients) -> TaskVector:
    """The task vector that coefficients make of experts, lazily: low-rank where the experts are.

    Raises ValueError for another number of experts, or a parameter whose block has no coefficient.
    """
    base = find_base(vectors)
    values = coefficients.values.tolist()
    if len(values) != len(vectors):
        raise ValueError(f"expected coefficients of {len(vectors)} experts, found {len(values)}")
    names = dict.fromkeys(name for vector in vectors for name in vector)
    place = {label: b for b, label in enumerate(coefficients.blocks)}
    blocks = assign_blocks(names, coefficients.granularity)
    unknown = sorted(set(blocks.values()) - set(place))
    if unknown:
        raise ValueError(f"expected a coefficient for each block, found none for {unknown[0]}")

    def at(name: str) -> Delta:
        here = [e for e, vector in enumerate(vectors) if name in vector.load]
        deltas = [vectors[e][name] for e in here]
        factors = [values[e][place[blocks[name]]] for e in here]
        if coefficients.values.ndim == 3:
            return _by_group(
                name, deltas, torch.tensor(factors, dtype=torch.float64), coefficients.seed
            )
        if coefficients.combine == "parameters":
            return mix_factors(deltas, factors)
        return sum_deltas(
            [delta.scaled(factor) for delta, factor in zip(deltas, factors, strict=True)]
        )

    return unite_vectors(base, vectors, at)


def _by_group(name: str, deltas: Sequence[Delta], factors_EK: Tensor, seed: int) -> Dense:
    """The sum of changes, each entry times the coefficient of its group."""
    first = deltas[0].dense()
    group = draw_groups(name, first.numel(), factors_EK.shape[1], seed).long().view(first.shape)
    result = torch.zeros_like(first)
    for delta, factors_K in zip(deltas, factors_EK.to(first), strict=True):
        result += delta.dense() * factors_K[group]
    return Dense(result)


def mix_factors(deltas: Sequence[Delta], factors: Sequence[float] | Tensor) -> LowRank:
    """`(sum_e f_e s_e B_e)(sum_e f_e A_e)`, which is not the sum of the changes.

    Raises ValueError for dense changes and for unequal ranks.
    """
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    ranks = sorted({delta.rank for delta in low})
    if len(low) < len(deltas) or len(ranks) > 1:
        raise ValueError(
            f"expected low-rank experts of one rank to sum their factors, "
            f"found {'ranks ' + ', '.join(map(str, ranks)) if len(ranks) > 1 else 'dense ones'}"
        )
    pairs = list(zip(low, factors, strict=True))
    a = torch.stack([delta.a * factor for delta, factor in pairs]).sum(0)
    b = torch.stack([delta.b * (delta.scale * factor) for delta, factor in pairs]).sum(0)
    return LowRank(a, b)
