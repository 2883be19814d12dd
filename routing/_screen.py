"""Exact pre-selection: of many probes, those that a token's top k may be among, found with coarser ones.

For many tokens these are of bfloat16: half the bytes and, on processors that multiply it, half the
time.  For few, whose time is that of reading the probes, they are of 8 bits: a quarter of the bytes.
Then the scores of the few that are left are computed from the probes themselves.  No other choice
comes out: for an input x and a probe v, rounded to x' and v',

    |x . v - x' . v'| <= |x - x'| |v| + |x'| |v - v'|

by Cauchy and Schwarz, and to it comes what floating point loses.  A token whose k-th exact score is
not above all that this leaves possible reads all probes.

Shapes as in `_router.py`; G modules, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from experthub.routing._kernels import FEW_TOKENS, each, normal, products
from experthub.routing._router import TopK, Weights
from torch import Tensor

MANY = 256  # experts, from which on it may be the faster way
FLOAT, HALF = torch.finfo(torch.float32), torch.finfo(torch.bfloat16)
FINE = 254  # parts of one step of 8 bits, in which what an input loses is taken up again


@dataclass(frozen=True, eq=False)
class Halves:
    """The probes `[G P, I]` in bfloat16.

    norm_G: the largest norm of a module's probes.  lost_G: of what rounding takes away of them, and
    floating point of their products with an input of norm 1.
    """

    candidates: ClassVar[int] = 8  # in the long run nearly all tokens have enough
    relative: ClassVar[float] = HALF.eps  # error of the scores, besides
    rows: Tensor
    norm_G: Tensor
    lost_G: Tensor

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Halves:
        rows = probes.bfloat16()
        return cls(rows, *_norms(probes, rows.float(), n_modules))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs `[T, I]`: `[T, G P]`, and how far from the exact ones they may be `[T, G]`."""
        near = x.bfloat16()
        wide = near.float()
        error = norm(x - wide) * self.norm_G + norm(wide) * self.lost_G
        return near @ self.rows.T, error


@dataclass(frozen=True, eq=False)
class Bytes:
    """The probes in 8 bits, `rows` times `scale_P`; the rest as in `Halves`.

    An input is two rows of 8 bits, the second for what the first leaves: it costs no time, as the
    probes are read once, and the error is that of the probes.  Sums of such products are exact.
    """

    candidates: ClassVar[int] = 24
    relative: ClassVar[float] = 0.0
    rows: Tensor
    scale_P: Tensor
    norm_G: Tensor
    lost_G: Tensor

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Bytes:
        scale_P1 = probes.abs().amax(1, keepdim=True).clamp(min=FLOAT.tiny) / 127
        rows = (probes / scale_P1).round()
        norms = _norms(probes, rows * scale_P1, n_modules)
        return cls(rows.to(torch.int8), scale_P1.squeeze(1), *norms)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale_T1 = norm(x, float("inf")).clamp_(min=FLOAT.tiny).div_(127)
        steps = x / scale_T1
        first = steps.round()
        both = torch.cat([first, (steps - first).mul_(FINE)]).round_().to(torch.int8)
        found, rest = torch._int_mm(both, self.rows.T).float().chunk(2)
        # Half a fine step is lost of each entry, and a little in finding the steps.
        lost = 0.51 / FINE * x.shape[1] ** 0.5
        error = norm(x) * self.lost_G + scale_T1 * lost * self.norm_G
        return found.add_(rest, alpha=1 / FINE) * (scale_T1 * self.scale_P), error


@dataclass(frozen=True, eq=False)
class Screen:
    """The probes of some modules, twice rounded."""

    halves: Halves
    bytes: Bytes

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Screen:
        return cls(Halves.of(probes, n_modules), Bytes.of(probes, n_modules))

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Screen | None:
        """What `tensors` made of one; None where nothing was."""
        if "screen.halves.rows" not in tensors:
            return None
        parts: dict[str, dict[str, Tensor]] = {"halves": {}, "bytes": {}}
        for name, tensor in tensors.items():
            start, *rest = name.split(".")
            if start == "screen":
                parts[rest[0]][rest[1]] = tensor
        return cls(Halves(**parts["halves"]), Bytes(**parts["bytes"]))

    @property
    def tensors(self) -> dict[str, Tensor]:
        parts = {"halves": vars(self.halves), "bytes": vars(self.bytes)}
        return {
            f"screen.{part}.{name}": t for part, own in parts.items() for name, t in own.items()
        }

    def weights(self, x_TI: Tensor, probes: Tensor, router: TopK, first_G1: Tensor) -> Weights:
        """What `router.weights` gives, over the scores of all probes; the experts in any order.

        first_G1: the place of each module's first probe.
        """
        x = normal(x_TI, router.layer_norm)
        n_tokens, n_modules = x.shape[0], first_G1.shape[0]
        few = n_tokens <= FEW_TOKENS
        coarse: Halves | Bytes = self.bytes if few else self.halves
        n_probes = probes.shape[0] // n_modules
        count = max(coarse.candidates, 4 * router.top_k)
        if n_probes <= count or not n_tokens:
            return router.weights((x @ probes.T).view(n_tokens, n_modules, n_probes))
        scores, error = coarse.scores(x)
        rough = router.ranked(scores.view(n_tokens, n_modules, n_probes))
        best, places = rough.topk(count + 1, dim=-1)
        places = places[..., :count]
        wanted = (places + first_G1).flatten(1)
        if few:
            exact = each(x, probes.index_select(0, wanted.view(-1)))
        else:
            exact = products(x, probes, wanted)
        values, own = router.ranked(exact.view(places.shape)).topk(router.top_k, dim=-1)
        experts = places.gather(-1, own)
        others = best[..., count].float()  # as good as any that is no candidate
        if coarse.relative:
            error = error + others.abs() * coarse.relative
        doubtful_TG = values[..., -1] <= others + error
        if doubtful_TG.any():
            unsure = doubtful_TG.any(1)
            scores = router.ranked((x[unsure] @ probes.T).view(-1, n_modules, n_probes))
            values[unsure], experts[unsure] = scores.topk(router.top_k, dim=-1)
        return Weights(values.softmax(-1), experts)


def norm(rows: Tensor, order: float = 2) -> Tensor:
    """Of every row, `[., 1]`."""
    found: Tensor = torch.linalg.vector_norm(rows, order, -1, keepdim=True)
    return found


def _norms(probes: Tensor, near: Tensor, n_modules: int) -> tuple[Tensor, Tensor]:
    """`norm_G` and `lost_G` of probes and what they are rounded to."""
    size_G, lost_G = (norm(rows).view(n_modules, -1).amax(1) for rows in (probes, probes - near))
    return size_G, lost_G + 2 * probes.shape[1] * FLOAT.eps * (size_G + lost_G)
