"""Coefficients of task vectors per block of parameters, and the merge that they define.

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
# A parameter's path up to its first number, which is the number of a transformer layer.
LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def assign_blocks(names: Iterable[str], granularity: str) -> dict[str, str]:
    """Assign every parameter to a block whose parameters share coefficients.

    Args:
        names: The names of parameters.
        granularity: The kind of block:

            - `task`: the whole model.
            - `layer` or `partition`: one parameter tensor, which the papers call a layer.
            - `block`: a transformer layer, or a module outside of the transformer layers.
            - A regular expression: names share a block if the expression, or its first group if it
              has one, matches the same text in them. Names without a match share the block `rest`.

    Returns:
        Parameter name -> the label of its block.

    Raises:
        ValueError: The granularity is neither of the names nor a regular expression.

    Example:
        >>> assign_blocks(["layers.0.q.weight", "layers.0.v.weight", "head.weight"], "block")
        {'layers.0.q.weight': 'layers.0', 'layers.0.v.weight': 'layers.0', 'head.weight': 'head'}
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
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"option 'granularity': expected task, layer, block, partition or a regular "
            f"expression, found {granularity!r}: {error}"
        ) from None
    first = min(pattern.groups, 1)
    matches = {name: pattern.search(name) for name in names}
    return {n: (m.group(first) or "rest") if m else "rest" for n, m in matches.items()}


def check_granularity(outline: Outline, options: Options) -> None:
    """Refuse a granularity that is neither a name nor a regular expression.

    Args:
        outline: The experts and the parameters that they change.
        options: The options of the method; `granularity` is among them.

    Raises:
        MethodError: The granularity is neither a name nor a regular expression.
    """
    try:
        assign_blocks(outline.parameters, options["granularity"])
    except ValueError as error:
        raise MethodError(
            str(error), "use task, layer, block or partition, or correct the regular expression"
        ) from None


def make_generator(*key: object) -> torch.Generator:
    """Create a random generator that is seeded from a key alone.

    Args:
        *key: Values whose `repr` is the same in every process, such as texts and numbers.

    Returns:
        A generator on the CPU.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_groups(name: str, count: int, groups: int, seed: int) -> Tensor:
    """Draw a random group for every entry of a parameter.

    Args:
        name: The name of the parameter.
        count: The number of entries P.
        groups: The number of groups K, at most 256.
        seed: The seed. The same name and seed give the same groups.

    Returns:
        The group of each entry `[P]`, from 0 to K - 1, as uint8.
    """
    drawn = make_generator("partition", seed, name)
    return torch.randint(groups, (count,), generator=drawn, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Factors that multiply the experts' changes, one per expert and block of parameters.

    Args:
        values: The coefficients `[E, B]`, finite; `[E, B, K]` if the entries of every parameter are
            divided into K groups.
        blocks: The labels of the B blocks, in the order of `values`.
        granularity: The kind of block, as for `assign_blocks`.
        combine: `outputs` sums the changes. `parameters` sums the factors of low-rank changes,
            `(sum c s B)(sum c A)`.
        seed: The seed of the groups.
        history: The loss at each step of learning.
        objective: The name of the objective that learning minimised.

    Raises:
        ValueError: The shape of `values` does not match the blocks, or a value is not finite.
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
            raise ValueError("expected finite coefficients, found NaN or infinity")


def make_zero_coefficients(experts: int) -> Coefficients:
    """Create zero coefficients `[E, 1]`: one for each expert as a whole.

    Args:
        experts: The number of experts E.

    Returns:
        Coefficients of one block, in double precision.
    """
    return Coefficients(torch.zeros(experts, 1, dtype=torch.float64), ("model",), "task")


def compose_vector(vectors: Sequence[TaskVector], coefficients: Coefficients) -> TaskVector:
    """Sum task vectors with the coefficients of their blocks, lazily.

    Args:
        vectors: The task vectors of E experts.
        coefficients: The coefficients of the same E experts.

    Returns:
        The task vector of the sum. A change is low-rank if the experts' changes are, unless entries
        are divided into groups.

    Raises:
        ValueError: The number of experts differs, the bases differ, or a block has no coefficient.
            Loading a name raises it for changes whose factors cannot be summed.
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

    def compute_change(name: str) -> Delta:
        here = [e for e, vector in enumerate(vectors) if name in vector.load]
        deltas = [vectors[e][name] for e in here]
        factors = [values[e][place[blocks[name]]] for e in here]
        if coefficients.values.ndim == 3:
            return _sum_by_group(
                name, deltas, torch.tensor(factors, dtype=torch.float64), coefficients.seed
            )
        if coefficients.combine == "parameters":
            return mix_factors(deltas, factors)
        return sum_deltas(
            [delta.scaled(factor) for delta, factor in zip(deltas, factors, strict=True)]
        )

    return unite_vectors(base, vectors, compute_change)


def _sum_by_group(name: str, deltas: Sequence[Delta], factors_EK: Tensor, seed: int) -> Dense:
    """Sum the changes of a parameter after multiplying each entry by the factor of its group."""
    first = deltas[0].dense()
    group = draw_groups(name, first.numel(), factors_EK.shape[1], seed).long().view(first.shape)
    result = torch.zeros_like(first)
    for delta, factors_K in zip(deltas, factors_EK.to(first), strict=True):
        result += delta.dense() * factors_K[group]
    return Dense(result)


def mix_factors(deltas: Sequence[Delta], factors: Sequence[float] | Tensor) -> LowRank:
    """Sum the factors of low-rank changes: `(sum_e f_e s_e B_e)(sum_e f_e A_e)`.

    The result is not the sum of the changes.

    Args:
        deltas: E low-rank changes of one rank R.
        factors: One factor per change, `[E]`; gradients flow to a tensor.

    Returns:
        A change of rank R.

    Raises:
        MethodError: A change is dense, or the ranks differ.
    """
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    ranks = sorted({delta.rank for delta in low})
    if len(low) < len(deltas) or len(ranks) > 1:
        raise MethodError(
            f"expected low-rank experts of one rank to sum their factors, "
            f"found {'ranks ' + ', '.join(map(str, ranks)) if len(ranks) > 1 else 'dense ones'}",
            "set combine: outputs",
        )
    pairs = list(zip(low, factors, strict=True))
    a = torch.stack([delta.a * factor for delta, factor in pairs]).sum(0)
    b = torch.stack([delta.b * (delta.scale * factor) for delta, factor in pairs]).sum(0)
    return LowRank(a, b)
