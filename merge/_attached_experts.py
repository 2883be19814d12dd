"""Experts inside a model, weighed by coefficients that get their gradients.

Shapes: E experts, B blocks, K groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType

import torch
from experthub.merge._coefficients import (
    Coefficients,
    assign_blocks,
    draw_groups,
    mix_factors,
)
from experthub.merge._delta import LowRank
from experthub.merge._linear_modules import is_plain_linear
from experthub.merge._merged_parameters import Beside, Merged, Rows, Use
from experthub.merge._task_vector import TaskVector
from torch import Tensor, nn


class AttachedExperts:
    """A model whose weights are those of the base plus experts times coefficients, for a while.

    As a context manager it puts the base's weights back.
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
        """like: coefficients of the shape, blocks and combination that will be set.

        halves: keep dense changes as bfloat16, in half the memory.  take: is given the complete
        gradient of every weight, by name, in place of the coefficients' getting theirs; then all
        changes are formed.
        """
        self._parts: dict[str, Merged | Rows | Beside] = {}
        names = list(dict.fromkeys(name for vector in vectors for name in vector))
        blocks = assign_blocks(names, like.granularity)
        place = {label: b for b, label in enumerate(like.blocks)}
        found = find_uses(model, names)
        for name in names:
            module, leaf = found[name][0]
            here = [e for e, vector in enumerate(vectors) if name in vector.load]
            block = place[blocks[name]]
            linear = leaf == "weight" and is_plain_linear(module)
            apart = linear and like.values.ndim == 2 and take is None
            deltas = [vectors[e][name] for e in here] if apart else []
            low = [delta for delta in deltas if isinstance(delta, LowRank)]
            if low and len(low) == len(here):
                self._parts[name] = Beside(module, low, here, block, like.combine)
                continue
            if like.combine == "parameters":
                mix_factors(deltas, [0.0] * len(deltas))  # says why not
            if take is None and like.values.ndim == 2 and Rows.fit(found[name]):
                own = [vectors[e] for e in here]
                self._parts[name] = Rows(found[name], own, name, here, block, halves)
                continue
            merged = Merged(found[name], vectors, name, here, block, halves)
            if like.values.ndim == 3:
                groups = like.values.shape[2]
                merged.split(draw_groups(name, merged.count, groups, like.seed), groups)
            if take is not None:
                merged.take = partial(take, name)
            self._parts[name] = merged

    def set(self, values: Tensor) -> None:
        """Give the model the weights of these coefficients, `[E, B]` or `[E, B, K]`."""
        self._values = values.detach().clone().requires_grad_(torch.is_grad_enabled())
        for part in self._parts.values():
            part.set(self._values)

    def gradient(self) -> Tensor:
        """Of the coefficients last set, from all that was differentiated since then."""
        total = torch.zeros_like(self._values) if self._values.grad is None else self._values.grad
        for part in self._parts.values():
            if not isinstance(part, Beside):
                part.add_gradient(total)
        return total.detach()

    def fix(self, name: str, change: Tensor) -> None:
        """Add a change to the base's weight, from the next `set` on; only with `take`."""
        part = self._parts[name]
        if isinstance(part, Merged):
            part.base_P = part.base_P + change.reshape(-1).to(part.base_P)

    def __enter__(self) -> AttachedExperts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for part in self._parts.values():
            part.detach()


def find_uses(model: nn.Module, names: Collection[str]) -> dict[str, list[Use]]:
    """The modules that hold each parameter, with its name there; its own module is the first.

    The others share it, and have no name among `names` that would change them apart.
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
