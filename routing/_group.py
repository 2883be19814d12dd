"""A group: linear modules that read one input, such as q, k and v, with their experts.

`A x` of the experts and the weights depend on the input alone. They are computed once for all
modules, when the first of them is called.

Shapes as in `_router.py`; G modules, N rows of A of all modules and experts, J rows of A that a
token uses in one module, k experts that a token chose in one module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from experthub.merge import Combine
from experthub.routing._context import Context, ForwardPass
from experthub.routing._expert_rows import ExpertRows
from experthub.routing._model_router import ModelRouter
from experthub.routing._packed import PackedExperts
from experthub.routing._router import TopK, Weights
from experthub.routing.kernels.dense import add_all, weigh_all
from experthub.routing.kernels.gather import FEW_TOKENS, add_gathered, multiply_gathered
from experthub.routing.kernels.names import FLOAT32_CPU_KERNELS, Kernel
from experthub.routing.kernels.sampled import add_chosen, multiply_chosen
from experthub.routing.kernels.scores import compute_inverse_deviation, compute_scores
from torch import Tensor, nn

FEW_ROWS = 80  # Rows of A in one module, up to which it is faster to read all of them.
Multiply = Callable[[Tensor, ExpertRows, Tensor], Tensor]
Add = Callable[[Tensor, Tensor, ExpertRows, Tensor], None]
# The functions of each kernel that reads chosen experts only: it multiplies with A, then adds `B z`.
SPARSE: dict[Kernel, tuple[Multiply, Add]] = {
    "gather": (multiply_gathered, add_gathered),
    "sampled": (multiply_chosen, add_chosen),
    "prefilter": (multiply_chosen, add_chosen),
}


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of a group.

    Attributes:
        few: The kernel for up to 16 tokens.
        many: The kernel for more tokens.
        forced: The kernel for all inputs; None chooses between `few` and `many`.
    """

    few: Kernel = "gather"
    many: Kernel = "sampled"
    forced: Kernel | None = None


class Mixed(NamedTuple):
    """The products `A x` of the experts times their weights, by module.

    Attributes:
        z_G: For each module, the weighted products `[T, J]`.
        experts_G: For each module, the chosen experts `[T, k]`; None for all experts.
        add: The function that adds the products with B.
    """

    z_G: Sequence[Tensor]
    experts_G: Sequence[Tensor] | None = None
    add: Add = add_gathered


class Group:
    """The experts of some modules, which compute and add their outputs.

    A group is not a torch module: attribute lookup on a module is several times slower, which is
    noticeable for a single token.
    """

    def __init__(
        self,
        packed: PackedExperts,
        dtype: torch.dtype,
        combine: Combine = "outputs",
        *,
        kernel: Kernel | None = None,
        trained: nn.Parameter | None = None,
        context: Context | None = None,
    ) -> None:
        """Check the experts, and choose kernels.

        Args:
            packed: The experts and their router.
            dtype: The dtype in which the experts are used: that of the base.
            combine: `outputs` mixes `B_e A_e x`; `parameters` mixes the A and the B first.
            kernel: The kernel for all inputs; None chooses by the number of tokens.
            trained: Trainable probes in place of the router's.
            context: The rows of the current batch, and decisions about whole rows.

        Raises:
            ValueError: `combine` is `parameters`, and ranks differ.
        """
        if combine == "parameters" and packed.a.places_Er is not None:
            raise ValueError("combine: parameters expects experts of one rank")
        if kernel == "prefilter" and isinstance(packed.router, TopK):
            packed = packed.with_prefilter()
        self.packed, self.dtype, self.combine, self.trained = packed, dtype, combine, trained
        self.size, self.n_experts = len(packed.b), len(packed.experts)
        self.context = context or Context()
        self.passes, self.key = self.context.passes, self.context.name_group()
        all_rows = self.n_experts * packed.a.rank <= FEW_ROWS
        self.kernels = KernelChoice(
            many="all" if all_rows else "sampled", forced="all" if trained is not None else kernel
        )
        # An input, its forward pass, whether gradients are computed, the products, and the modules that
        # were not called with it yet.
        self._held: tuple[Tensor, ForwardPass | None, bool, Mixed, set[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy gets: all but the products that are held for a running forward pass."""
        return {**vars(self), "_held": None}

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to each tensor, such as a move to another device.

        Args:
            change: A function of one tensor that keeps its shape.
        """
        self.packed, self._held = self.packed.map(change), None
        self.dtype = change(torch.empty(0, dtype=self.dtype)).dtype
        plain = self.dtype == torch.float32 and self.packed.a.matrix.device.type == "cpu"
        if self.kernels.forced in FLOAT32_CPU_KERNELS and not plain:
            self.kernels = replace(self.kernels, forced=None)

    def add_to(self, y: Tensor, x: Tensor, module: int) -> Tensor:
        """Add the outputs of one module's experts, in place.

        Args:
            y: Outputs of the base `[..., O]`, which are changed.
            x: Inputs `[..., I]`.
            module: The module's position in the group.

        Returns:
            The changed outputs `y`.
        """
        now = self.passes.find() if self.passes.announced else None
        if now is not None and now.off:
            return y
        mixed = self._mix_once(x, module, now)
        y_TO, b = y.view(-1, y.shape[-1]), self.packed.b[module]
        if mixed.experts_G is None:
            add_all(y_TO, mixed.z_G[module], b.own)
        else:
            mixed.add(y_TO, mixed.z_G[module], b, mixed.experts_G[module])
        return y

    def compute_weights(self, x: Tensor, module: int) -> Tensor:
        """Compute the weights that one module's experts get.

        Args:
            x: Inputs `[..., I]`.
            module: The module's position in the group.

        Returns:
            The weights `[..., E]`.
        """
        x_TI = x.reshape(-1, x.shape[-1])
        weights = self._weigh(self._compute_scores(x_TI), x).dense(self.n_experts)
        weights = weights.expand(len(x_TI), self.size, self.n_experts)[:, module]
        return weights.reshape(*x.shape[:-1], self.n_experts)

    def _mix_once(self, x: Tensor, module: int, now: ForwardPass | None) -> Mixed:
        """Keep the mixed products of an input until each module was called with the same tensor.

        Threads may replace each other's products, which are then computed again. Products of another
        forward pass are never used.
        """
        if self.size == 1:
            return self._mix(x)
        held, graph = self._held, torch.is_grad_enabled()
        if (
            held is None
            or held[0] is not x
            or held[1] is not now
            or held[2] != graph
            or module not in held[4]
        ):
            held = x, now, graph, self._mix(x), set(range(self.size))
        held[4].discard(module)
        self._held = held if held[4] else None
        return held[3]

    def _mix(self, x: Tensor) -> Mixed:
        """Compute `A x` times the weights for all modules."""
        packed, x_TI = self.packed, x.reshape(-1, x.shape[-1])
        kernel = self._choose_kernel(x_TI)
        if kernel == "all" and packed.joint is not None:
            both, count = x_TI @ packed.joint.T, len(packed.a.own)
            scores = self._view_by_module(both[:, count:])
            if packed.router.layer_norm:
                scores = scores * compute_inverse_deviation(x_TI)[:, None, None]
            return self._mix_all(both[:, :count], self._weigh(scores, x))
        weights = self._compute_prefiltered(x_TI) if kernel == "prefilter" else None
        if weights is None:
            weights = self._weigh(self._compute_scores(x_TI), x)
        experts = weights.experts
        if kernel == "all" or experts is None:
            return self._mix_all(x_TI @ packed.a.own.to(x_TI.dtype).T, weights)
        if experts.shape[1] != self.size:
            experts = experts.expand(-1, self.size, -1)
        if kernel == "prefilter" and x_TI.shape[0] <= FEW_TOKENS:
            kernel = "gather"
        multiply, add = SPARSE[kernel]
        rows = experts + packed.first_G1 if self.size > 1 else experts
        z = multiply(x_TI, packed.a, rows.flatten(1))
        w = weights.values.to(z.dtype).unsqueeze(-1)
        z = z.view(*experts.shape, packed.a.rank) * w
        if self.combine == "parameters":
            z = z.sum(2, keepdim=True) * w
        return Mixed(z.flatten(2).unbind(1), experts.unbind(1), add)

    def _mix_all(self, z_TN: Tensor, weights: Weights) -> Mixed:
        """Multiply `A x` of all experts by their weights."""
        packed = self.packed
        z_TN = weigh_all(z_TN, weights.dense(self.n_experts), packed, self.combine)
        if self.size == 1:
            return Mixed((z_TN,))
        return Mixed(z_TN.split_with_sizes([len(b.own) for b in packed.b], 1))

    def _compute_prefiltered(self, x_TI: Tensor) -> Weights | None:
        """Compute the weights with the prefilter; return None if there is none."""
        packed = self.packed
        probes, router = packed.probes, packed.router
        if packed.prefilter is None or probes is None or not isinstance(router, TopK):
            return None
        return packed.prefilter.choose(x_TI, probes, router, packed.first_G1)

    def _compute_scores(self, x_TI: Tensor) -> Tensor:
        """Compute the scores `[T, G, P]` of the probes."""
        probes = self.packed.probes if self.trained is None else self.trained.float()
        return self._view_by_module(compute_scores(x_TI, probes, self.packed.router.layer_norm))

    def _view_by_module(self, scores: Tensor) -> Tensor:
        """View scores `[T, G P]` as `[T, G, P]`."""
        n_tokens, n_probes = scores.shape
        return scores.view(n_tokens, self.size, n_probes // self.size)

    def _weigh(self, scores: Tensor, x: Tensor) -> Weights:
        """Compute the router's weights from scores `[T, G, P]`."""
        router = self.packed.router
        if isinstance(router, ModelRouter):
            return router.find(x.shape[:-1])
        if not router.pooled:
            return router.weights(scores)
        leading, now = x.shape[:-1], self.context.current
        found = router.weights(now.pool_scores(self.key, scores, leading))
        return found.repeat_rows(now.infer_shape(leading)[1])

    def _choose_kernel(self, x_TI: Tensor) -> Kernel:
        """Choose the kernel for some inputs."""
        kernels = self.kernels
        if kernels.forced is not None:
            return kernels.forced
        if torch.is_grad_enabled() and x_TI.requires_grad:
            return "all"
        # Sampled and prefiltered products need float32 on a CPU, and cannot be compiled.
        plain = x_TI.dtype == torch.float32 and x_TI.device.type == "cpu"
        plain = plain and not torch.compiler.is_compiling()
        if x_TI.shape[0] <= FEW_TOKENS:
            return kernels.few if plain or kernels.few != "prefilter" else "gather"
        return kernels.many if plain else "all"
