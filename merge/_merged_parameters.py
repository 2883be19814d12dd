"""Parameters of a model that experts change, and the gradients of their coefficients.

If all experts of a linear module are low-rank, their changes are never made dense: the memory is
that of the base, the adapters and the activations. Any other merged weight is a leaf of the autograd
graph. The gradient of a coefficient is then the inner product of the weight's gradient and the
expert's change. It is computed as soon as the weight's gradient is complete, which is then freed.
The result equals the gradient through the sum, but the graph of the sum is not stored.

Shapes: E experts, B blocks, P entries of a parameter, K groups of entries, R sum of ranks, I and O
features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from experthub.merge._coefficients import mix_factors
from experthub.merge._delta import LowRank
from experthub.merge._linear_modules import orient
from experthub.merge._task_vector import TaskVector
from torch import Tensor, nn

CHUNK_ENTRIES = 1 << 18  # The number of entries that are converted to the wider dtype at once.
Use = tuple[nn.Module, str]  # A module, and the name of one of its parameters.


@dataclass(frozen=True, eq=False)
class AttachedParameter:
    """A parameter of the base that experts change.

    Args:
        name: The name of the parameter.
        uses: The modules that hold the parameter.
        vectors: The task vectors of the experts that change it.
        here: The positions of these experts among all experts.
        block: The position of the parameter's block among the coefficients.
    """

    name: str
    uses: Sequence[Use]
    vectors: Sequence[TaskVector]
    here: Sequence[int]
    block: int


class MergedParameter:
    """A merged parameter `W0 + sum_e c[e] tau_e` that is a leaf of the autograd graph."""

    def __init__(self, changed: AttachedParameter, halves: bool) -> None:
        """Replace a parameter of the base.

        Args:
            changed: The parameter and the experts that change it.
            halves: Keep the changes as bfloat16.
        """
        self.uses, self.block = changed.uses, changed.block
        self.here = torch.tensor(changed.here)
        self.original = getattr(*changed.uses[0])
        self.base_P = self.original.detach().reshape(-1)
        self.count = len(self.base_P)
        dtype, device = torch.bfloat16 if halves else self.base_P.dtype, self.base_P.device
        self.stack_EP = torch.empty(len(self.here), self.count, dtype=dtype, device=device)
        for row, vector in enumerate(changed.vectors):
            self.stack_EP[row] = vector[changed.name].dense().reshape(-1)
        self.order_P: Tensor | None = None
        self.spans = [(0, self.count)]  # The entries of each group, as (start, end).
        self.weight = nn.Parameter(self.original.detach().clone())
        self._register(self.weight)
        self.weight.register_post_accumulate_grad_hook(self._take_gradient)  # type: ignore[no-untyped-call]
        self.sums: Tensor | None = None
        self.take: Callable[[Tensor], None] | None = None

    def split(self, group_P: Tensor, groups: int) -> None:
        """Give every group of entries its own coefficient.

        The entries of the changes are reordered so that each group is contiguous.

        Args:
            group_P: The group of each entry `[P]`, from 0 to K - 1.
            groups: The number of groups K.
        """
        self.order_P = group_P.argsort(stable=True)
        counts = torch.bincount(group_P.long(), minlength=groups)
        self.spans = list(pairwise([0, *counts.cumsum(0).tolist()]))
        self.stack_EP = self.stack_EP[:, self.order_P]

    def set(self, values: Tensor) -> None:
        """Merge the parameter with some coefficients.

        Args:
            values: The coefficients of all experts and blocks, `[E, B]` or `[E, B, K]`.
        """
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
        """Compute `out = base + factors @ stack` for the entries from start to end."""
        for s in range(start, end, CHUNK_ENTRIES):
            e = min(s + CHUNK_ENTRIES, end)
            tau_PE = self.stack_EP[:, s:e].to(base_P.dtype).T
            torch.addmv(base_P[s:e], tau_PE, factors, out=out_P[s:e])

    def _take_gradient(self, weight: Tensor) -> None:
        """Add the inner products of the complete gradient and the changes, and free the gradient."""
        if weight.grad is None:
            return
        if self.take is not None:
            self.take(weight.grad)
            weight.grad = None
            return
        flat_P = weight.grad.reshape(-1)
        if self.order_P is not None:
            flat_P = flat_P[self.order_P]
        found = torch.stack([self._multiply(flat_P, s, e) for s, e in self.spans], 1)
        self.sums = found if self.sums is None else self.sums + found
        weight.grad = None

    def _multiply(self, flat_P: Tensor, start: int, end: int) -> Tensor:
        """Compute the inner product `[E]` of a gradient and each change, from start to end."""
        found = torch.zeros(len(self.here), dtype=torch.float64, device=flat_P.device)
        for s in range(start, end, CHUNK_ENTRIES):
            e = min(s + CHUNK_ENTRIES, end)
            found += torch.mv(self.stack_EP[:, s:e].to(flat_P.dtype), flat_P[s:e])
        return found

    def add_gradient(self, total: Tensor) -> None:
        """Add the gradient of this parameter's coefficients to that of all coefficients.

        Args:
            total: The gradient of all coefficients, `[E, B]` or `[E, B, K]`; changed in place.
        """
        if self.sums is not None:
            chosen = total[self.here, self.block]
            total[self.here, self.block] = chosen + self.sums.to(total).view_as(chosen)

    def _register(self, weight: nn.Parameter) -> None:
        """Put a parameter into all modules that hold this one."""
        for module, leaf in self.uses:
            module.register_parameter(leaf, weight)

    def detach(self) -> None:
        """Put the base's parameter back."""
        self._register(self.original)


class LowRankBranch:
    """Low-rank experts whose outputs a forward hook adds to the output of a linear module."""

    def __init__(
        self, module: nn.Module, low: list[LowRank], here: Sequence[int], block: int, combine: str
    ) -> None:
        """Add a forward hook to a linear module.

        Args:
            module: The linear module; its weight does not change.
            low: The low-rank changes of the experts that change the module.
            here: The positions of these experts among all experts.
            block: The position of the module's block among the coefficients.
            combine: `outputs` sums the changes; `parameters` sums their factors.

        Raises:
            MethodError: `combine` is `parameters`, and the ranks differ.
        """
        weight: Tensor = module.get_parameter("weight")
        oriented = [orient(delta, module) for delta in low]
        fitted = [LowRank(d.a.to(weight), d.b.to(weight), d.scale) for d in oriented]
        self.low = fitted if combine == "parameters" else []
        if self.low:
            mix_factors(self.low, [0.0] * len(low))  # It refuses ranks that differ.
        self.here, self.block, self.combine = torch.tensor(here), block, combine
        self.a_RI = torch.cat([d.a for d in fitted])
        self.b_OR = torch.cat([d.b * d.scale for d in fitted], 1)
        self.owner_R = torch.tensor([i for i, d in enumerate(fitted) for _ in range(d.rank)])
        self.values: Tensor | None = None
        self._hook = module.register_forward_hook(self._forward)

    def set(self, values: Tensor) -> None:
        """Use some coefficients from the next forward pass on; autograd gives them gradients.

        Each pass selects its own, so that each has a graph of its own for its backward pass.

        Args:
            values: The coefficients of all experts and blocks, `[E, B]`.
        """
        self.values = values

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the experts' outputs to the output of the module."""
        if self.values is None:
            return output
        factors = self.values[self.here, self.block].to(self.a_RI)
        if self.combine == "parameters":
            mixed = mix_factors(self.low, factors)
            return output + nn.functional.linear(nn.functional.linear(inputs[0], mixed.a), mixed.b)
        hidden_R = nn.functional.linear(inputs[0], self.a_RI) * factors[self.owner_R]
        # Adding in place is safe: nobody else holds the module's output, and no gradient needs it.
        return output.add_(nn.functional.linear(hidden_R, self.b_OR))

    def detach(self) -> None:
        """Remove the forward hook."""
        self._hook.remove()
