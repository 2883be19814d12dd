"""Mixing kernels: the weighted sum of the experts' outputs, added to the base's.

Shapes as in `_router.py`, with the tokens flattened to T.
"""

from __future__ import annotations

import torch
from experthub.routing._router import ExpertStack, Router
from torch import Tensor


def read(x_TI: Tensor, rows: Tensor, n_ranks: int) -> tuple[Tensor, Tensor]:
    """`A x` of all experts `[T, R]` and the probes' scores `[T, P]`, from one product.

    rows: `[R + P, I]`, A above the probes, so that x is read once.
    """
    both = x_TI @ rows.T
    return both[:, :n_ranks], both[:, n_ranks:]


def scored(x_TI: Tensor, probes_PI: Tensor | None) -> Tensor:
    """The probes' scores `[T, P]` in float32, from a product of their own."""
    if probes_PI is None:
        return x_TI.new_empty((len(x_TI), 0), dtype=torch.float32)
    return x_TI.float() @ probes_PI.T


def mix_outputs(y_TO: Tensor, z_TR: Tensor, w: Tensor, owner_R: Tensor, b_RO: Tensor) -> Tensor:
    """`y + sum_e w_e s_e B_e z_e`, in place: dense over the experts, with masked rows.

    w: `[T, E]`, or `[E]` for weights that no input changes.
    """
    return y_TO.addmm_(z_TR * w.index_select(-1, owner_R).to(z_TR.dtype), b_RO)


def mix_parameters(y_TO: Tensor, z_TR: Tensor, w: Tensor, owner_R: Tensor, b_RO: Tensor) -> Tensor:
    """`y + (sum_e w_e s_e B_e)(sum_e w_e A_e x)`, in place; all experts have one rank."""
    n_experts = w.shape[-1]
    w_R = w.index_select(-1, owner_R).to(z_TR.dtype)
    mixed_Tr = (z_TR * w_R).view(len(z_TR), n_experts, -1).sum(1)
    return y_TO.addmm_(mixed_Tr.repeat(1, n_experts) * w_R, b_RO)


def reference(
    x_TI: Tensor, y_TO: Tensor, stack: ExpertStack, router: Router, combine: str
) -> Tensor:
    """The literal definition, one token and one expert at a time; for tests only."""
    out = y_TO.clone()
    for t in range(len(x_TI)):
        x = x_TI[t : t + 1]
        w_E = router.weights(x, scored(x, router.probes_PI)).reshape(-1)
        a = [stack.a_RI[stack.owner_R == e] for e in range(len(stack.experts))]
        b = [stack.b_RO[stack.owner_R == e].T for e in range(len(stack.experts))]
        if combine == "outputs":
            for e, w in enumerate(w_E):
                out[t] += w * (b[e] @ (a[e] @ x[0]))
        else:
            b_mix = torch.stack([w * b[e] for e, w in enumerate(w_E)]).sum(0)
            a_mix = torch.stack([w * a[e] for e, w in enumerate(w_E)]).sum(0)
            out[t] += b_mix @ (a_mix @ x[0])
    return out
