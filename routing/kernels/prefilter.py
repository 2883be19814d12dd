"""The kernel `prefilter`: the exact top k of many probes, after coarse probes excluded most of them.

For many tokens the coarse probes are in bfloat16: half the bytes and, on processors that multiply
it, half the time. For few tokens, where reading the probes takes the time, they are in 8 bits: a
quarter of the bytes. The scores of the remaining candidates are computed with the exact probes. The
result is the exact top k, because for an input x and a probe v, rounded to x' and v',

    |x . v - x' . v'| <= |x - x'| |v| + |x'| |v - v'|

by Cauchy and Schwarz. The error of floating point is added to this bound. If an excluded probe could
still reach the k-th exact score of a token, all probes of that token are scored exactly.

Shapes: T tokens, I inputs of a module, G modules, P probes of one module, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from experthub.routing._router import TopK, Weights
from experthub.routing.kernels.gather import FEW_TOKENS, multiply_own_rows
from experthub.routing.kernels.sampled import multiply_sampled
from experthub.routing.kernels.scores import normalise_inputs
from torch import Tensor

MIN_PREFILTERED_EXPERTS = 256  # The number of experts from which a prefilter may be faster.
FLOAT, BFLOAT16 = torch.finfo(torch.float32), torch.finfo(torch.bfloat16)
FINE = 254  # Fine steps in one step of 8 bits; they hold the rounding error of an input.


@dataclass(frozen=True, eq=False)
class Bfloat16Probes:
    """Probes in bfloat16.

    Attributes:
        candidates: The number of probes per token that are scored exactly. It is enough for nearly
            all tokens in practice.
        relative: A relative error of the scores that the bound does not include.
        rows: The rounded probes `[G P, I]`.
        norm_G: For each module, the largest norm of its probes.
        lost_G: For each module, the largest norm of its probes' rounding errors, plus the error of
            floating point in their products with an input of norm 1.
    """

    candidates: ClassVar[int] = 8
    relative: ClassVar[float] = BFLOAT16.eps
    rows: Tensor
    norm_G: Tensor
    lost_G: Tensor

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Bfloat16Probes:
        """Round probes to bfloat16.

        Args:
            probes: The probes of all modules `[G P, I]` in float32.
            n_modules: The number of modules G.

        Returns:
            The coarse probes.
        """
        rows = probes.bfloat16()
        return cls(rows, *_compute_norms(probes, rows.float(), n_modules))

    def compute_scores(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply inputs with the coarse probes.

        Args:
            x_TI: Inputs `[T, I]` in float32.

        Returns:
            The scores `[T, G P]`, and a bound `[T, G]` on their distance from the exact scores.
        """
        near = x_TI.bfloat16()
        wide = near.float()
        error = compute_norm(x_TI - wide) * self.norm_G + compute_norm(wide) * self.lost_G
        return near @ self.rows.T, error


@dataclass(frozen=True, eq=False)
class Int8Probes:
    """Probes in 8 bits, `rows` times `scale_P`.

    An input becomes two rows of 8 bits, where the second holds the rounding error of the first. This
    takes no time, because the probes are read once, and only the error of the probes remains. Sums
    of such products are exact.

    Attributes:
        candidates: The number of probes per token that are scored exactly.
        relative: A relative error of the scores that the bound does not include: none.
        rows: The rounded probes `[G P, I]`.
        scale_P: The factor of each rounded probe.
        norm_G: For each module, the largest norm of its probes.
        lost_G: For each module, the largest norm of its probes' rounding errors, as in `Bfloat16Probes`.
    """

    candidates: ClassVar[int] = 24
    relative: ClassVar[float] = 0.0
    rows: Tensor
    scale_P: Tensor
    norm_G: Tensor
    lost_G: Tensor

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Int8Probes:
        """Round probes to 8 bits.

        Args:
            probes: The probes of all modules `[G P, I]` in float32.
            n_modules: The number of modules G.

        Returns:
            The coarse probes.
        """
        scale_P1 = probes.abs().amax(1, keepdim=True).clamp(min=FLOAT.tiny) / 127
        rows = (probes / scale_P1).round()
        norms = _compute_norms(probes, rows * scale_P1, n_modules)
        return cls(rows.to(torch.int8), scale_P1.squeeze(1), *norms)

    def compute_scores(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply inputs with the coarse probes.

        Args:
            x_TI: Inputs `[T, I]` in float32.

        Returns:
            The scores `[T, G P]`, and a bound `[T, G]` on their distance from the exact scores.
        """
        scale_T1 = compute_norm(x_TI, float("inf")).clamp_(min=FLOAT.tiny).div_(127)
        steps = x_TI / scale_T1
        first = steps.round()
        both = torch.cat([first, (steps - first).mul_(FINE)]).round_().to(torch.int8)
        found, rest = torch._int_mm(both, self.rows.T).float().chunk(2)
        # Each entry loses up to half a fine step, and a little more when the steps are computed.
        lost = 0.51 / FINE * x_TI.shape[1] ** 0.5
        error = compute_norm(x_TI) * self.lost_G + scale_T1 * lost * self.norm_G
        return found.add_(rest, alpha=1 / FINE) * (scale_T1 * self.scale_P), error


@dataclass(frozen=True, eq=False)
class Prefilter:
    """Coarse copies of the probes of some modules, in bfloat16 and in 8 bits.

    Args:
        bfloat16: The probes in bfloat16, for many tokens.
        int8: The probes in 8 bits, for few tokens.
    """

    bfloat16: Bfloat16Probes
    int8: Int8Probes

    @classmethod
    def of(cls, probes: Tensor, n_modules: int) -> Prefilter:
        """Round probes to both precisions.

        Args:
            probes: The probes of all modules `[G P, I]` in float32.
            n_modules: The number of modules G.

        Returns:
            The prefilter.
        """
        return cls(Bfloat16Probes.of(probes, n_modules), Int8Probes.of(probes, n_modules))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Prefilter | None:
        """Make a prefilter from named tensors.

        Args:
            tensors: The tensors that the property `tensors` returned, among others.

        Returns:
            The prefilter; None if the tensors contain none.
        """
        if "prefilter.halves.rows" not in tensors:
            return None
        parts: dict[str, dict[str, Tensor]] = {"halves": {}, "bytes": {}}
        for name, tensor in tensors.items():
            start, *rest = name.split(".")
            if start == "prefilter":
                parts[rest[0]][rest[1]] = tensor
        return cls(Bfloat16Probes(**parts["halves"]), Int8Probes(**parts["bytes"]))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        parts = {"halves": vars(self.bfloat16), "bytes": vars(self.int8)}
        return {
            f"prefilter.{part}.{name}": t for part, own in parts.items() for name, t in own.items()
        }

    def choose(self, x_TI: Tensor, probes: Tensor, router: TopK, first_G1: Tensor) -> Weights:
        """Compute the weights that the router gives for the scores of all probes.

        Args:
            x_TI: Inputs `[T, I]`.
            probes: The exact probes of all modules `[G P, I]` in float32.
            router: The router.
            first_G1: The position of the first probe of each module.

        Returns:
            The weights. The experts of a token may be in any order.
        """
        x = normalise_inputs(x_TI, router.layer_norm)
        n_tokens, n_modules = x.shape[0], first_G1.shape[0]
        few = n_tokens <= FEW_TOKENS
        coarse: Bfloat16Probes | Int8Probes = self.int8 if few else self.bfloat16
        n_probes = probes.shape[0] // n_modules
        count = max(coarse.candidates, 4 * router.top_k)
        if n_probes <= count or not n_tokens:
            return router.weights((x @ probes.T).view(n_tokens, n_modules, n_probes))
        scores, error = coarse.compute_scores(x)
        rough = router.rank_scores(scores.view(n_tokens, n_modules, n_probes))
        best, places = rough.topk(count + 1, dim=-1)
        places = places[..., :count]
        wanted = (places + first_G1).flatten(1)
        if few:
            exact = multiply_own_rows(x, probes.index_select(0, wanted.view(-1)))
        else:
            exact = multiply_sampled(x, probes, wanted)
        values, own = router.rank_scores(exact.view(places.shape)).topk(router.top_k, dim=-1)
        experts = places.gather(-1, own)
        others = best[..., count].float()  # The best coarse score of the excluded probes.
        if coarse.relative:
            error = error + others.abs() * coarse.relative
        doubtful_TG = values[..., -1] <= others + error
        if doubtful_TG.any():
            unsure = doubtful_TG.any(1)
            scores = router.rank_scores((x[unsure] @ probes.T).view(-1, n_modules, n_probes))
            values[unsure], experts[unsure] = scores.topk(router.top_k, dim=-1)
        return Weights(values.softmax(-1), experts)


def compute_norm(rows: Tensor, order: float = 2) -> Tensor:
    """Compute the norm of each row.

    Args:
        rows: The rows `[., C]`.
        order: The order of the norm.

    Returns:
        The norms `[., 1]`.
    """
    found: Tensor = torch.linalg.vector_norm(rows, order, -1, keepdim=True)
    return found


def _compute_norms(probes: Tensor, near: Tensor, n_modules: int) -> tuple[Tensor, Tensor]:
    """Compute `norm_G` and `lost_G` from probes and their rounded values."""
    norm_G, lost_G = (
        compute_norm(rows).view(n_modules, -1).amax(1) for rows in (probes, probes - near)
    )
    return norm_G, lost_G + 2 * probes.shape[1] * FLOAT.eps * (norm_G + lost_G)
