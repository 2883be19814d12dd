"""Experts inside a model, multiplied by coefficients that have gradients.

Shapes: E experts, B blocks, K groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType

import torch
from experthub.merge._catalogue import MethodError
from experthub.merge._coefficients import Coefficients, assign_blocks, draw_groups
from experthub.merge._delta import LowRank
from experthub.merge._embedding_rows import EmbeddingRows
from experthub.merge._linear_modules import is_plain_linear
from experthub.merge._merged_parameters import (
    AttachedParameter,
    LowRankBranch,
    MergedParameter,
    Use,
)
from experthub.merge._task_vector import TaskVector
from experthub.merge._weight_reads import find_weight_reads
from torch import Tensor, nn

Part = MergedParameter | EmbeddingRows | LowRankBranch


class AttachedExperts:
    """A model whose weights are those of the base plus the experts' changes times coefficients.

    It is a context manager. On exit, the model has the base's weights again.

    Example:
        >>> with AttachedExperts(model, vectors, coefficients) as attached:  # doctest: +SKIP
        ...     attached.set(coefficients.values)
        ...     model(inputs).loss.backward()
        ...     gradient = attached.gradient()
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Sequence[TaskVector],
        like: Coefficients,
        *,
        halves: bool = False,
        take: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """Attach experts to a model.

        Args:
            model: The base. Its parameters are replaced, or forward hooks are added to its modules.
            vectors: The task vectors of E experts.
            like: Coefficients with the shape, the blocks and the combination that will be set.
            halves: Keep dense changes as bfloat16, in half the memory.
            take: Called with the name and the complete gradient of every weight, as soon as a
                backward pass has computed it. The coefficients then get no gradient, and all
                changes are made dense.

        Raises:
            MethodError: The coefficients sum factors, and a change is not a low-rank change of a
                linear module, or the ranks differ.
        """
        self._parts: dict[str, Part] = {}
        names = list(dict.fromkeys(name for vector in vectors for name in vector))
        blocks = assign_blocks(names, like.granularity)
        place = {label: b for b, label in enumerate(like.blocks)}
        found, reads = find_uses(model, names), find_weight_reads(model)
        try:
            for name in names:
                here = [e for e, vector in enumerate(vectors) if name in vector.load]
                own = [vectors[e] for e in here]
                changed = AttachedParameter(name, found[name], own, here, place[blocks[name]])
                self._parts[name] = _attach_part(
                    changed, like, halves, take, is_read=name.removesuffix(".weight") in reads
                )
        except BaseException:
            self._detach()
            raise

    def set(self, values: Tensor) -> None:
        """Set the model's weights to those of some coefficients.

        Args:
            values: The coefficients, `[E, B]` or `[E, B, K]`.
        """
        self._values = values.detach().clone().requires_grad_(torch.is_grad_enabled())
        for part in self._parts.values():
            part.set(self._values)

    def gradient(self) -> Tensor:
        """Return the gradient of the coefficients that were set last.

        Returns:
            The sum over all backward passes since `set`, in the shape of the coefficients.
        """
        total = torch.zeros_like(self._values) if self._values.grad is None else self._values.grad
        for part in self._parts.values():
            if not isinstance(part, LowRankBranch):
                part.add_gradient(total)
        return total.detach()

    def fix(self, name: str, change: Tensor) -> None:
        """Add a change to a weight of the base; it takes effect with the next `set`.

        The weight is restored on exit.

        Args:
            name: The name of the parameter.
            change: The change, in the parameter's shape.

        Raises:
            TypeError: The experts are not attached with `take`.
        """
        part = self._parts[name]
        if not isinstance(part, MergedParameter):
            raise TypeError(f"{name}: expected experts that are attached with `take`")
        part.base_P = part.base_P + change.reshape(-1).to(part.base_P)

    def __enter__(self) -> AttachedExperts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        """Give the model the base's weights again."""
        for part in self._parts.values():
            part.detach()


def _attach_part(
    changed: AttachedParameter,
    like: Coefficients,
    halves: bool,
    take: Callable[[str, Tensor], None] | None,
    is_read: bool,
) -> Part:
    """Attach the changes of one parameter in the form that needs the least memory and time."""
    module, leaf = changed.uses[0]
    plain = like.values.ndim == 2 and take is None
    # A forward hook would miss a weight that is read without a call of its module.
    if plain and not is_read and leaf == "weight" and is_plain_linear(module):
        deltas = [vector[changed.name] for vector in changed.vectors]
        low = [delta for delta in deltas if isinstance(delta, LowRank)]
        if len(low) == len(deltas):
            return LowRankBranch(module, low, changed.here, changed.block, like.combine)
    if like.combine == "parameters":
        raise MethodError(
            f"{changed.name}: expected low-rank changes of linear modules to sum their factors, "
            "found another change",
            "set combine: outputs",
        )
    if plain and EmbeddingRows.is_looked_up_only(changed.uses):
        return EmbeddingRows(changed, halves)
    merged = MergedParameter(changed, halves)
    if like.values.ndim == 3:
        groups = like.values.shape[2]
        merged.split(draw_groups(changed.name, merged.count, groups, like.seed), groups)
    if take is not None:
        merged.take = partial(take, changed.name)
    return merged


def find_uses(model: nn.Module, names: Collection[str]) -> dict[str, list[Use]]:
    """Find the modules that use each parameter.

    Modules with tied weights share a parameter. A use under another name is included unless that
    name is among `names`, because it then gets a change of its own.

    Args:
        model: The model.
        names: The names of parameters.

    Returns:
        Parameter name -> pairs of a module and the parameter's name in that module. The module that
        the name refers to is the first.
    """
    found: dict[int, list[Use]] = {}
    own: dict[str, Use] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if name in names:
            own[name] = modules[owner], leaf
        else:
            found.setdefault(id(parameter), []).append((modules[owner], leaf))
    return {n: [use, *found.get(id(getattr(*use)), [])] for n, use in own.items()}
