"""Experts inside a model, weighed by coefficients that get their gradients.

Where all experts of a linear module are low-rank, their changes are never formed: memory is that
of the base, the adapters and the activations. Elsewhere the merged weight is a leaf of the graph,
and the gradient of a coefficient is its inner product with the expert's change, taken and freed
as soon as the weight's gradient is complete: the same number as through the sum, without keeping
the sum's graph.

Shapes: E experts, B blocks, K groups, P entries of a parameter, R sum of ranks, I and O features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import torch
from experthub.merge._coefficients import Coefficients, blocks_of, mixed_factors
from experthub.merge._coefficients import partition as groups_of
from experthub.merge._delta import LowRank
from experthub.merge._task_vector import TaskVector
from torch import Tensor, nn

CHUNK = 1 << 18  # entries that are widened at once


class Attached:
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
        self.model = model
        self.shape = tuple(like.values.shape)
        self._parts: dict[str, _Merged | _Beside] = {}
        names = list(dict.fromkeys(name for vector in vectors for name in vector))
        blocks = blocks_of(names, like.granularity)
        place = {label: b for b, label in enumerate(like.blocks)}
        modules = dict(model.named_modules())
        for name in names:
            owner, _, leaf = name.rpartition(".")
            here = [e for e, vector in enumerate(vectors) if name in vector.load]
            block = place[blocks[name]]
            linear = leaf == "weight" and type(modules[owner]).__name__ in ("Linear", "Conv1D")
            apart = linear and like.values.ndim == 2 and take is None
            deltas = [vectors[e][name] for e in here] if apart else []
            low = [delta for delta in deltas if isinstance(delta, LowRank)]
            if low and len(low) == len(here):
                self._parts[name] = _Beside(modules[owner], low, here, block, like.combine)
                continue
            if like.combine == "parameters":
                mixed_factors(deltas, [0.0] * len(deltas))  # says why not
            merged = _Merged(modules[owner], leaf, vectors, name, here, block, halves)
            if like.values.ndim == 3:
                groups = self.shape[2]
                merged.split(groups_of(name, merged.count, groups, like.seed), groups)
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
            if isinstance(part, _Merged):
                part.add_gradient(total)
        return total.detach()

    def fix(self, name: str, change: Tensor) -> None:
        """Add a change to the base's weight, from the next `set` on; only with `take`."""
        part = self._parts[name]
        if isinstance(part, _Merged):
            part.base_P = part.base_P + change.reshape(-1).to(part.base_P)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for part in self._parts.values():
            part.detach()


class _Merged:
    """One parameter as a leaf: `W0 + sum_e c[e] tau_e`."""

    def __init__(
        self,
        module: nn.Module,
        leaf: str,
        vectors: Sequence[TaskVector],
        name: str,
        here: list[int],
        block: int,
        halves: bool,
    ) -> None:
        self.module, self.leaf, self.block = module, leaf, block
        self.here = torch.tensor(here)
        self.original = getattr(module, leaf)
        self.base_P = self.original.detach().reshape(-1)
        self.count = len(self.base_P)
        dtype = torch.bfloat16 if halves else self.base_P.dtype
        self.stack_EP = torch.empty(len(here), self.count, dtype=dtype, device=self.base_P.device)
        for row, e in enumerate(here):
            self.stack_EP[row] = vectors[e][name].dense().reshape(-1)
        self.order_P: Tensor | None = None
        self.starts: list[int] = []
        self.weight = nn.Parameter(self.original.detach().clone())
        module.register_parameter(leaf, self.weight)
        self.weight.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
        self.sums: Tensor | None = None
        self.take: Callable[[Tensor], None] | None = None

    def split(self, group_P: Tensor, groups: int) -> None:
        """Give every group of entries its own coefficient: equal groups are put side by side."""
        self.order_P = group_P.argsort(stable=True)
        counts = torch.bincount(group_P.long(), minlength=groups)
        self.starts = [0, *counts.cumsum(0).tolist()]
        self.stack_EP = self.stack_EP[:, self.order_P]

    def set(self, values: Tensor) -> None:
        factors = values.detach()[self.here, self.block].to(self.base_P)
        with torch.no_grad():
            flat_P = self.weight.view(-1)
            if self.order_P is None:
                self._add(self.base_P, factors, 0, self.count, flat_P)
            else:
                sorted_P = self.base_P[self.order_P]
                for k, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
                    self._add(sorted_P, factors[:, k].contiguous(), start, end, sorted_P)
                flat_P[self.order_P] = sorted_P
        self.sums = None

    def _add(self, base_P: Tensor, factors: Tensor, start: int, end: int, out_P: Tensor) -> None:
        """`out = base + factors @ stack` from start to end."""
        for s in range(start, end, CHUNK):
            e = min(s + CHUNK, end)
            tau_PE = self.stack_EP[:, s:e].to(base_P.dtype).T
            torch.addmv(base_P[s:e], tau_PE, factors, out=out_P[s:e])

    def _take(self, weight: Tensor) -> None:
        """The inner products of a complete gradient with the changes; then it is freed."""
        if weight.grad is None:
            return
        if self.take is not None:
            self.take(weight.grad)
            weight.grad = None
            return
        flat_P = weight.grad.reshape(-1)
        if self.order_P is None:
            found = self._products(flat_P, 0, self.count)
        else:
            flat_P = flat_P[self.order_P]
            pairs = zip(self.starts, self.starts[1:], strict=False)
            found = torch.stack([self._products(flat_P, s, e) for s, e in pairs], 1)
        self.sums = found if self.sums is None else self.sums + found
        weight.grad = None

    def _products(self, flat_P: Tensor, start: int, end: int) -> Tensor:
        found = torch.zeros(len(self.here), dtype=torch.float64, device=flat_P.device)
        for s in range(start, end, CHUNK):
            e = min(s + CHUNK, end)
            found += torch.mv(self.stack_EP[:, s:e].to(flat_P.dtype), flat_P[s:e])
        return found

    def add_gradient(self, total: Tensor) -> None:
        if self.sums is not None:
            total[self.here, self.block] += self.sums.to(total)

    def detach(self) -> None:
        self.module.register_parameter(self.leaf, self.original)


class _Beside:
    """Low-rank experts beside a linear module, which they do not change."""

    def __init__(
        self, module: nn.Module, low: list[LowRank], here: list[int], block: int, combine: str
    ) -> None:
        conv = type(module).__name__ == "Conv1D"  # its weight is [I, O]
        weight: Tensor = module.get_parameter("weight")

        def for_inputs(delta: LowRank) -> LowRank:
            a, b = (delta.b.T, delta.a.T) if conv else (delta.a, delta.b)
            return LowRank(a.to(weight), b.to(weight), delta.scale)

        self.low = [for_inputs(delta) for delta in low]
        self.here, self.block, self.combine = torch.tensor(here), block, combine
        self.a_RI = torch.cat([d.a for d in self.low])
        self.b_OR = torch.cat([d.b * d.scale for d in self.low], 1)
        self.owner_R = torch.tensor([i for i, d in enumerate(self.low) for _ in range(d.rank)])
        self.factors = torch.zeros(len(here))
        self._hook = module.register_forward_hook(self._forward)

    def set(self, values: Tensor) -> None:
        self.factors = values[self.here, self.block].to(self.a_RI)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.combine == "parameters":
            mixed = mixed_factors(self.low, self.factors)
            return output + nn.functional.linear(nn.functional.linear(inputs[0], mixed.a), mixed.b)
        hidden_R = nn.functional.linear(inputs[0], self.a_RI) * self.factors[self.owner_R]
        # In place: the module's own output is nobody else's, and needed for no gradient.
        return output.add_(nn.functional.linear(hidden_R, self.b_OR))

    def detach(self) -> None:
        self._hook.remove()
