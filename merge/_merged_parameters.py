"""Parameters of a model that experts change, and the gradients of their coefficients.

Where all experts of a linear module are low-rank, their changes are never formed: memory is that
of the base, the adapters and the activations. Elsewhere the merged weight is a leaf of the graph,
and the gradient of a coefficient is its inner product with the expert's change, taken and freed
as soon as the weight's gradient is complete: the same number as through the sum, without keeping
the sum's graph. Of an embedding only the rows that inputs ask for are merged and kept: others
neither change what is read nor have a gradient.

Shapes: E experts, P entries of a parameter, K groups of them, R sum of ranks, I and O features; of
an embedding V rows, the first S of their places in use, U in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from experthub.merge._coefficients import mix_factors
from experthub.merge._delta import LowRank
from experthub.merge._linear_modules import orient
from experthub.merge._task_vector import TaskVector
from torch import Tensor, nn

CHUNK = 1 << 18  # entries that are widened at once
Use = tuple[nn.Module, str]  # a module, and the name of one of its parameters


class Merged:
    """One parameter as a leaf: `W0 + sum_e c[e] tau_e`."""

    def __init__(
        self,
        uses: list[Use],
        vectors: Sequence[TaskVector],
        name: str,
        here: list[int],
        block: int,
        halves: bool,
    ) -> None:
        self.uses, self.block = uses, block
        self.here = torch.tensor(here)
        self.original = getattr(*uses[0])
        self.base_P = self.original.detach().reshape(-1)
        self.count = len(self.base_P)
        dtype = torch.bfloat16 if halves else self.base_P.dtype
        self.stack_EP = torch.empty(len(here), self.count, dtype=dtype, device=self.base_P.device)
        for row, e in enumerate(here):
            self.stack_EP[row] = vectors[e][name].dense().reshape(-1)
        self.order_P: Tensor | None = None
        self.spans = [(0, self.count)]  # of the entries that share a coefficient
        self.weight = nn.Parameter(self.original.detach().clone())
        self._hold(self.weight)
        self.weight.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
        self.sums: Tensor | None = None
        self.take: Callable[[Tensor], None] | None = None

    def split(self, group_P: Tensor, groups: int) -> None:
        """Give every group of entries its own coefficient: equal groups are put side by side."""
        self.order_P = group_P.argsort(stable=True)
        counts = torch.bincount(group_P.long(), minlength=groups)
        self.spans = list(pairwise([0, *counts.cumsum(0).tolist()]))
        self.stack_EP = self.stack_EP[:, self.order_P]

    def set(self, values: Tensor) -> None:
        factors_EK = values.detach()[self.here, self.block].to(self.base_P).view(len(self.here), -1)
        with torch.no_grad():
            flat_P = self.weight.view(-1)
            base_P = self.base_P if self.order_P is None else self.base_P[self.order_P]
            out_P = flat_P if self.order_P is None else base_P
            for factors_E, (start, end) in zip(factors_EK.T, self.spans, strict=True):
                self._add(base_P, factors_E.contiguous(), start, end, out_P)
            if self.order_P is not None:
                flat_P[self.order_P] = out_P
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
        if self.order_P is not None:
            flat_P = flat_P[self.order_P]
        found = torch.stack([self._products(flat_P, s, e) for s, e in self.spans], 1)
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
            chosen = total[self.here, self.block]
            total[self.here, self.block] = chosen + self.sums.to(total).view_as(chosen)

    def _hold(self, weight: nn.Parameter) -> None:
        for module, leaf in self.uses:
            module.register_parameter(leaf, weight)

    def detach(self) -> None:
        self._hold(self.original)


class Rows:
    """The rows of an embedding that inputs ask for: `W0[v] + sum_e c[e] tau_e[v]`, leaves of the graph."""

    def __init__(
        self,
        uses: list[Use],
        vectors: Sequence[TaskVector],
        name: str,
        here: list[int],
        block: int,
        halves: bool,
    ) -> None:
        self.vectors, self.name, self.block = vectors, name, block
        self.here = torch.tensor(here)
        self.base_VO = getattr(*uses[0]).detach()
        device = self.base_VO.device
        self.place_V = torch.full((len(self.base_VO),), -1, device=device)
        dtype = torch.bfloat16 if halves else self.base_VO.dtype
        # Only the first S places are ever written, and memory is taken up when it is written to.
        self.stack_EVO = torch.empty(len(here), *self.base_VO.shape, dtype=dtype, device=device)
        self.seen = 0
        self.factors = torch.zeros(len(here)).to(self.base_VO)
        self.sums: Tensor | None = None
        self._hooks = [module.register_forward_hook(self._forward) for module, _ in uses]

    @staticmethod
    def fit(uses: list[Use]) -> bool:
        """Whether nothing is done with a parameter but to look up its rows."""
        return all(
            type(m) is nn.Embedding and m.max_norm is None and not m.scale_grad_by_freq
            for m, _ in uses
        )

    def set(self, values: Tensor) -> None:
        self.factors = values.detach()[self.here, self.block].to(self.base_VO)
        self.sums = None

    def _forward(self, module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows_U, places = torch.unique(inputs[0], return_inverse=True)
        self._read(rows_U[self.place_V[rows_U] < 0])
        at_U = self.place_V[rows_U]
        leaf_UO = self.base_VO[rows_U]
        for factor, tau_VO in zip(self.factors, self.stack_EVO, strict=True):
            leaf_UO.add_(tau_VO[at_U].to(leaf_UO.dtype) * factor)
        padding = None
        if module.padding_idx is not None:  # it is read, and has no gradient
            padding = next(iter((rows_U == module.padding_idx).nonzero()[:, 0].tolist()), None)
        if torch.is_grad_enabled():
            leaf_UO.requires_grad_()
            leaf_UO.register_post_accumulate_grad_hook(partial(self._take, at_U))
        return nn.functional.embedding(places, leaf_UO, padding)

    def _read(self, rows: Tensor) -> None:
        """Keep the changes of rows that were not asked for before."""
        if not len(rows):
            return
        new = slice(self.seen, self.seen + len(rows))
        self.place_V[rows] = torch.arange(new.start, new.stop, device=rows.device)
        for tau_VO, vector in zip(self.stack_EVO, self.vectors, strict=True):
            tau_VO[new] = vector[self.name].dense()[rows]
        self.seen = new.stop

    def _take(self, at_U: Tensor, leaf: Tensor) -> None:
        """The inner products of the rows' gradients with the changes; then they are freed."""
        if leaf.grad is None:
            return
        flat = leaf.grad.reshape(-1)
        products = [
            torch.dot(tau_VO[at_U].reshape(-1).to(flat.dtype), flat) for tau_VO in self.stack_EVO
        ]
        found = torch.stack(products).double()
        self.sums = found if self.sums is None else self.sums + found
        leaf.grad = None

    def add_gradient(self, total: Tensor) -> None:
        if self.sums is not None:
            total[self.here, self.block] += self.sums.to(total)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Beside:
    """Low-rank experts beside a linear module, which they do not change."""

    def __init__(
        self, module: nn.Module, low: list[LowRank], here: list[int], block: int, combine: str
    ) -> None:
        weight: Tensor = module.get_parameter("weight")

        oriented = [orient(delta, module) for delta in low]
        fitted = [LowRank(d.a.to(weight), d.b.to(weight), d.scale) for d in oriented]
        self.low = fitted if combine == "parameters" else []
        self.here, self.block, self.combine = torch.tensor(here), block, combine
        self.a_RI = torch.cat([d.a for d in fitted])
        self.b_OR = torch.cat([d.b * d.scale for d in fitted], 1)
        self.owner_R = torch.tensor([i for i, d in enumerate(fitted) for _ in range(d.rank)])
        self.factors = torch.zeros(len(here))
        self._hook = module.register_forward_hook(self._forward)

    def set(self, values: Tensor) -> None:
        self.factors = values[self.here, self.block].to(self.a_RI)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.combine == "parameters":
            mixed = mix_factors(self.low, self.factors)
            return output + nn.functional.linear(nn.functional.linear(inputs[0], mixed.a), mixed.b)
        hidden_R = nn.functional.linear(inputs[0], self.a_RI) * self.factors[self.owner_R]
        # In place: the module's own output is nobody else's, and needed for no gradient.
        return output.add_(nn.functional.linear(hidden_R, self.b_OR))

    def detach(self) -> None:
        self._hook.remove()
