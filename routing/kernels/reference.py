"""The definition of routing as plain loops, against which every kernel is tested.

Shapes: T tokens, I inputs and O outputs of a module.
"""

from __future__ import annotations

import torch
from experthub.merge import Combine
from experthub.routing._router import ExpertStack, Router
from experthub.routing.kernels.scores import compute_scores
from torch import Tensor


def compute_reference(
    x_TI: Tensor, y_TO: Tensor, stack: ExpertStack, router: Router, combine: Combine
) -> Tensor:
    """Compute the outputs of a routed module, one token and one expert at a time.

    Args:
        x_TI: Inputs `[T, I]`.
        y_TO: Outputs of the base `[T, O]`.
        stack: The experts of the module.
        router: The router over them.
        combine: `outputs` mixes `B_e A_e x`; `parameters` mixes the A and the B first.

    Returns:
        The outputs of the routed module `[T, O]`.
    """
    out = y_TO.clone()
    n_experts = len(stack.experts)
    a = [delta.a for delta in stack.deltas.values()]
    b = [delta.b * delta.scale for delta in stack.deltas.values()]
    for t in range(len(x_TI)):
        x = x_TI[t : t + 1]
        scores = compute_scores(x, router.probes_PI, router.layer_norm)[:, None]
        w_E = router.weights(scores).dense(n_experts).reshape(-1)
        if combine == "outputs":
            for e, w in enumerate(w_E):
                out[t] += w * (b[e] @ (a[e] @ x[0]))
        else:
            b_mix = torch.stack([w * b[e] for e, w in enumerate(w_E)]).sum(0)
            a_mix = torch.stack([w * a[e] for e, w in enumerate(w_E)]).sum(0)
            out[t] += b_mix @ (a_mix @ x[0])
    return out
