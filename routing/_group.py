"""Experts beside linear modules that read one input: q, k and v, for example.

What depends on the input alone, the experts' `A x` and the weights, is computed once for all of
them, when the first of them is called.

Shapes as in `_router.py`; G modules, N rows of A of all modules and experts, J those that a token
uses in one module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain, pairwise
from typing import Any, Literal

import torch
from experthub.merge import Combine
from experthub.routing._context import Context
from experthub.routing._kernels import CHOSEN, FEW_TOKENS, inverse_deviation, scored
from experthub.routing._packed import Packed
from experthub.routing._router import Router, TopK, Weights
from experthub.routing._rows import Rows, joined
from experthub.routing._screen import Screen
from torch import Tensor, nn

Kernel = Literal["all", "copied", "sampled", "screened"]
FEW_ROWS = 80  # of A in one module


@dataclass(frozen=True, eq=False)
class Mixed:
    """The experts' `A x` times their weights.

    z: `[T, N]` of all experts, or `[T, G, J]` of those chosen.  experts: `[T, G, k]` the chosen.
    """

    z: Tensor
    experts: Tensor | None = None
    kernel: Kernel = "all"


class Group:
    """All experts of some modules: their A, and below these the probes, and the B of each module.

    packed: the experts and routers.  like: a weight of the base, whose device all get, and in whose
    dtype experts are used.  kernel: which rows of A are read: `all`; or, of a router that chooses,
    those of the chosen, `copied` or `sampled`, or `screened`, which also finds them in another way;
    None takes `few` for few tokens and `many` for more.
    trained: probes in place of the routers'.  context: what routers know of the batch.  Raises
    ValueError for combine: parameters with unequal ranks.

    No torch module: attributes of one are found several times slower, which counts for one token.
    """

    def __init__(
        self,
        packed: Packed,
        like: Tensor,
        combine: Combine = "outputs",
        *,
        kernel: Kernel | None = None,
        trained: nn.Parameter | None = None,
        context: Context | None = None,
    ) -> None:
        ranks, rank, self.router = packed.ranks, packed.rank, packed.router
        probes = [part.to(like.device) for part in packed.probes]
        # One product reads x for A and the probes; in a narrower dtype the scores need their own.
        single = like.dtype == torch.float32 and trained is None
        self.fused = bool(probes) and single and not packed.mapped
        below = probes if self.fused else ()
        self.a = Rows(packed.a, [*chain(*ranks)], rank, like, below, packed.mapped)
        if combine == "parameters" and self.a.ragged:
            raise ValueError("combine: parameters expects experts of one rank")
        pairs = zip(packed.b, ranks, strict=True)
        self.b = [Rows([b_RO], own, rank, like, mapped=packed.mapped) for b_RO, own in pairs]
        self.apart = None if self.fused or not probes else joined(probes)
        self.screen = packed.screen
        if self.screen is None and kernel == "screened" and isinstance(self.router, TopK):
            self.screen = Screen.of(self.a.below if self.fused else joined(probes), len(ranks))
        self.trained = trained
        self.experts = packed.experts
        self.size, self.n_experts = len(ranks), len(packed.experts)
        self.combine, self.dtype = combine, like.dtype
        self.context = context or Context()
        self.kernel: Kernel | None = kernel if trained is None else "all"
        self.few: Kernel = "copied"
        self.many: Kernel = "all" if self.n_experts * self.a.rank <= FEW_ROWS else "sampled"
        self.spans = list(pairwise(accumulate(map(sum, ranks), initial=0)))  # of N, by module
        self.owner_N = packed.owner_N.to(like.device) if self.a.ragged else None
        self.first_G1 = torch.arange(self.size, device=like.device)[:, None] * self.n_experts
        self._held: tuple[Tensor, Mixed, set[int]] | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensors by what a function makes of them: others on another device, say."""
        for rows in (self.a, *self.b):
            rows.apply(change)
        self.first_G1 = change(self.first_G1)
        self.owner_N = None if self.owner_N is None else change(self.owner_N)
        self.apart = None if self.apart is None else change(self.apart)
        self._held = None

    def add_to(self, y: Tensor, x: Tensor, module: int) -> Tensor:
        """`y` `[..., O]` plus what the experts of one module make of x `[..., I]`, in place."""
        if self.context.off:
            return y
        mixed, y_TO = self._mixed(x, module), y.view(-1, y.shape[-1])
        if mixed.experts is None:
            start, end = self.spans[module]
            y_TO.addmm_(mixed.z[:, start:end], self.b[module].own.to(y.dtype))
        else:
            write = CHOSEN[mixed.kernel][1]
            write(y_TO, mixed.z[:, module], self.b[module], mixed.experts[:, module])
        return y

    def weights(self, x: Tensor, module: int) -> Tensor:
        """The weights `[..., E]` that one module's experts get for inputs `[..., I]`."""
        x_TI = x.reshape(-1, x.shape[-1])
        weights = self._weights(self._scores(x_TI), x).dense(self.n_experts)
        weights = weights.expand(len(x_TI), self.size, self.n_experts)[:, module]
        return weights.reshape(*x.shape[:-1], self.n_experts)

    def _mixed(self, x: Tensor, module: int) -> Mixed:
        """What all modules need of an input, kept until each of them was called with this tensor."""
        if self.size == 1:
            return self._mix(x)
        held = self._held
        if held is None or held[0] is not x or module not in held[2]:
            held = x, self._mix(x), set(range(self.size))
        held[2].discard(module)
        self._held = held if held[2] else None
        return held[1]

    def _mix(self, x: Tensor) -> Mixed:
        x_TI = x.reshape(-1, x.shape[-1])
        kernel = self._kernel(x_TI)
        if kernel == "all" and self.fused:
            both = x_TI @ self.a.read.T
            scores = self._by_module(both[:, self.a.count :])
            if self.router.layer_norm:
                scores = scores * inverse_deviation(x_TI)[:, None, None]
            w = self._weights(scores, x).dense(self.n_experts)
            return Mixed(self._times(both[:, : self.a.count], w))
        weights = self._screened(x_TI) if kernel == "screened" else None
        if weights is None:
            weights = self._weights(self._scores(x_TI), x)
        experts = weights.experts
        if kernel == "all" or experts is None:
            w = weights.dense(self.n_experts)
            return Mixed(self._times(x_TI @ self.a.own.to(x_TI.dtype).T, w))
        if experts.shape[1] != self.size:
            experts = experts.expand(-1, self.size, -1)
        if kernel == "screened" and x_TI.shape[0] <= FEW_TOKENS:
            kernel = "copied"  # from here on
        rows = experts + self.first_G1 if self.size > 1 else experts
        z = CHOSEN[kernel][0](x_TI, self.a, rows.flatten(1))
        w = weights.values.to(z.dtype).unsqueeze(-1)
        z = z.view(*experts.shape, self.a.rank) * w
        if self.combine == "parameters":
            z = z.sum(2, keepdim=True) * w
        return Mixed(z.flatten(2), experts, kernel)

    def _times(self, z_TN: Tensor, w: Tensor) -> Tensor:
        """`A x` of all experts times their weights `[E]` or `[T, G, E]`."""
        w = w.expand(*w.shape[:-2], self.size, self.n_experts).flatten(-2).to(z_TN.dtype)
        if self.owner_N is not None:
            return z_TN * w.index_select(-1, self.owner_N)
        z, w = z_TN.view(len(z_TN), self.size * self.n_experts, self.a.rank), w.unsqueeze(-1)
        z = z * w
        if self.combine == "parameters":
            shape = len(z), self.size, self.n_experts, self.a.rank
            z = z.view(shape).sum(2, keepdim=True).expand(shape).flatten(1, 2) * w
        return z.flatten(1)

    def _weights(self, scores: Tensor, x: Tensor) -> Weights:
        """The weights that the routers make of scores `[T, G, P]`."""
        if not self.router.pooled:
            return self.router.weights(scores)
        leading = x.shape[:-1]
        found = self.router.weights(self.context.pooled(id(self), scores, leading))
        return found.repeated(self.context.shape(leading)[1])

    def _scores(self, x_TI: Tensor) -> Tensor:
        """The probes' scores `[T, G, P]`."""
        return self._by_module(scored(x_TI, self._probes, self.router.layer_norm))

    def _screened(self, x_TI: Tensor) -> Weights | None:
        """The same weights by a screen; None where there is none."""
        screen, router, probes = self.screen, self.router, self._probes
        if screen is None or probes is None or not isinstance(router, TopK):
            return None
        return screen.weights(x_TI, probes, router, self.first_G1)

    @property
    def _probes(self) -> Tensor | None:
        """Those of all modules, float32."""
        return self.a.below if self.fused else self.apart if self.trained is None else self.trained

    def _by_module(self, scores: Tensor) -> Tensor:
        n_tokens, n_probes = scores.shape
        return scores.view(n_tokens, self.size, n_probes // self.size)

    def _kernel(self, x_TI: Tensor) -> Kernel:
        """Which rows of A to read for these inputs."""
        if self.kernel is not None:
            return self.kernel
        if torch.is_grad_enabled() and x_TI.requires_grad:
            return "all"
        # Sparse and screened products: of this dtype, of this device, and of no graph that is captured.
        plain = x_TI.dtype == torch.float32 and x_TI.device.type == "cpu"
        plain = plain and not torch.compiler.is_compiling()
        if x_TI.shape[0] <= FEW_TOKENS:
            return self.few if plain or self.few != "screened" else "copied"
        return self.many if plain else "all"


def alike(routers: Sequence[Router]) -> bool:
    """Whether routers differ in nothing but their probes."""
    first, *others = ([type(r), *_settings(r)] for r in routers)
    return all(len(first) == len(o) and all(map(_same, first, o)) for o in others)


def _settings(router: Any) -> list[Any]:
    return [getattr(router, field.name) for field in fields(router) if field.name != "probes_PI"]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)
