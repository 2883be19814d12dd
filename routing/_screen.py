"""Exact pre-selection: of many probes, those that a token's top k may be among, found in bfloat16.

Half the bytes and, on processors that multiply bfloat16, half the time; then the scores of those few
are computed from the probes themselves.  No other choice comes out: for an input x and a probe v,
rounded to x' and v',

    |x . v - x' . v'| <= |x - x'| |v| + |x'| |v - v'|

by Cauchy and Schwarz, and to it comes what adding up in float32 and rounding the result lose.  A
token whose k-th exact score is not above all that this leaves possible reads all probes.

Shapes as in `_router.py`; G modules, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from experthub.routing._kernels import normal, products
from experthub.routing._router import TopK, Weights
from torch import Tensor

CANDIDATES = 8  # of a token and module, at least; in the long run nearly all tokens have enough
MANY = 256  # experts, from which on it may be the faster way


@dataclass(frozen=True, eq=False)
class Screen:
    """The probes `[G P, I]` of some modules in bfloat16.

    norm_G1: the largest norm of a module's probes.  lost_G1: of what bfloat16 loses of them.
    """

    rows: Tensor
    norm_G1: Tensor
    lost_G1: Tensor

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Screen:
        rows = probes.bfloat16()
        lost = (probes - rows).norm(dim=-1).view(n_modules, -1).amax(1, keepdim=True)
        norm = probes.norm(dim=-1).view(n_modules, -1).amax(1, keepdim=True)
        return cls(rows, norm, lost)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Screen | None:
        """What `tensors` made of one; None where nothing was."""
        return cls(*(tensors[name] for name in NAMES)) if NAMES[0] in tensors else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(NAMES, (self.rows, self.norm_G1, self.lost_G1), strict=True))

    def weights(self, x_TI: Tensor, probes: Tensor, router: TopK) -> Weights:
        """What `router.weights` gives, over the scores of all probes; the experts in any order."""
        x = normal(x_TI, router.layer_norm)
        n_modules, n_tokens = len(self.norm_G1), len(x)
        near = x.bfloat16()
        rough = router.ranked((near @ self.rows.T).view(n_tokens, n_modules, -1))
        count = max(CANDIDATES, 4 * router.top_k)
        if rough.shape[-1] <= count:
            return router.weights((x @ probes.T).view(rough.shape))
        best, places = rough.topk(count + 1, dim=-1)
        places = places[..., :count]
        first_G1 = torch.arange(n_modules, device=x.device)[:, None] * rough.shape[-1]
        exact = products(x, probes, (places + first_G1).flatten(1)).view(places.shape)
        values, own = router.ranked(exact).topk(router.top_k, dim=-1)
        experts = places.gather(-1, own)
        others = best[..., count].float()  # as good as any that is no candidate
        unsure = (values[..., -1] <= others + self._error(x, near, others)).any(1)
        if unsure.any():
            scores = router.ranked((x[unsure] @ probes.T).view(-1, *rough.shape[1:]))
            values[unsure], experts[unsure] = scores.topk(router.top_k, dim=-1)
        return Weights(values.softmax(-1), experts)

    def _error(self, x: Tensor, near: Tensor, rough_TG: Tensor) -> Tensor:
        """How far exact scores may be from rough ones `[T, G]`."""
        wide = near.float()
        lost_T1 = (x - wide).norm(dim=-1, keepdim=True)
        norm_T1 = wide.norm(dim=-1, keepdim=True)
        added = 2 * x.shape[1] * torch.finfo(torch.float32).eps
        norm_G, lost_G = self.norm_G1.squeeze(1), self.lost_G1.squeeze(1)
        error = lost_T1 * norm_G + norm_T1 * (lost_G + added * (norm_G + lost_G))
        rounded: Tensor = error + rough_TG.abs() * torch.finfo(torch.bfloat16).eps
        return rounded


NAMES = ("screen.rows", "screen.norm", "screen.lost")
