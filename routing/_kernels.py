"""Mixing kernels: the experts' `A x`, and their outputs, which are added to the base's.

Of all experts, or of those that each token chose: then for few tokens the rows of A and B are
copied, for many they are read where they are. Nothing here waits for a device.

Shapes as in `_router.py`, with the tokens flattened to T; J rows that a token uses.
"""

from __future__ import annotations

import warnings

import torch
from experthub.routing._router import EPS, ExpertStack, Router
from experthub.routing._rows import Rows
from torch import Tensor, nn

FEW_TOKENS = 16

# The one layout that the product below takes; users can do nothing about it.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)


def normal(x_TI: Tensor, layer_norm: bool) -> Tensor:
    """The inputs as probes read them, in float32."""
    wide = x_TI.float()
    return nn.functional.layer_norm(wide, wide.shape[1:], eps=EPS) if layer_norm else wide


def scored(x_TI: Tensor, probes_PI: Tensor | None, layer_norm: bool) -> Tensor:
    """The probes' scores `[T, P]` in float32, `[T, 0]` without probes."""
    if probes_PI is None:
        return x_TI.new_empty((len(x_TI), 0), dtype=torch.float32)
    return torch.mm(normal(x_TI, layer_norm), probes_PI.T)


def inverse_deviation(x_TI: Tensor) -> Tensor:
    """`1 / sqrt(var(x) + eps)` of every row, `[T]`: by a norm, which is fast where a variance is not."""
    norm_T: Tensor = torch.linalg.vector_norm(x_TI - x_TI.mean(-1, keepdim=True), dim=-1)
    return (norm_T.square() / x_TI.shape[1] + EPS).rsqrt()


def read_copied(x_TI: Tensor, a: Rows, experts_TK: Tensor) -> Tensor:
    """`A x` of the experts that each token chose, `[T, J, 1]`."""
    return each(x_TI, a.copied(experts_TK.reshape(-1), x_TI.dtype))


def each(x_TI: Tensor, rows: Tensor) -> Tensor:
    """Each token times rows of its own, `[T J, I]`: `[T, J, 1]`."""
    (n_tokens, width), count = x_TI.shape, rows.shape[0]
    own = rows.view(n_tokens, count // max(n_tokens, 1), width)
    return torch.bmm(own, x_TI.unsqueeze(-1))


def products(x_TI: Tensor, rows: Tensor, places_TJ: Tensor) -> Tensor:
    """`x` of each token times some of the rows, `[T, J]`: of a sparse product, the entries wanted."""
    n_tokens, width = places_TJ.shape
    wanted = torch.sparse_csr_tensor(
        torch.arange(0, n_tokens * width + 1, width, device=x_TI.device),
        places_TJ.reshape(-1),
        x_TI.new_zeros(n_tokens * width),
        size=(n_tokens, len(rows)),
        check_invariants=False,
    )
    found: Tensor = torch.sparse.sampled_addmm(wanted, x_TI, rows.T, beta=0.0).values()
    return found.view(n_tokens, width)


def read_sampled(x_TI: Tensor, a: Rows, experts_TK: Tensor) -> Tensor:
    """The same by a product with A of which only the chosen entries are computed."""
    return products(x_TI, *a.once(experts_TK, x_TI.dtype))


def write_copied(y_TO: Tensor, z_TJ: Tensor, b: Rows, experts_Tk: Tensor) -> None:
    """`y + B z` of the experts that each token chose, in place."""
    rows = b.copied(experts_Tk.reshape(-1), z_TJ.dtype)
    if y_TO.shape[0] == 1:
        y_TO.addmm_(z_TJ, rows)
    else:
        y_TO.unsqueeze(1).baddbmm_(z_TJ.unsqueeze(1), rows.view(*z_TJ.shape, y_TO.shape[1]))


def write_summed(y_TO: Tensor, z_TJ: Tensor, b: Rows, experts_Tk: Tensor) -> None:
    """The same as a weighted sum of rows of B, which are not copied for every token."""
    rows, places = b.once(experts_Tk, z_TJ.dtype)
    y_TO.add_(nn.functional.embedding_bag(places, rows, per_sample_weights=z_TJ, mode="sum"))


CHOSEN = {
    "copied": (read_copied, write_copied),
    "sampled": (read_sampled, write_summed),
    "screened": (read_sampled, write_summed),
}


def reference(
    x_TI: Tensor, y_TO: Tensor, stack: ExpertStack, router: Router, combine: str
) -> Tensor:
    """The literal definition, one token and one expert at a time; for tests only."""
    out = y_TO.clone()
    n_experts = len(stack.experts)
    for t in range(len(x_TI)):
        x = x_TI[t : t + 1]
        scores = scored(x, router.probes_PI, router.layer_norm)[:, None]
        w_E = router.weights(scores).dense(n_experts).reshape(-1)
        a = [delta.a for delta in stack.deltas.values()]
        b = [delta.b * delta.scale for delta in stack.deltas.values()]
        if combine == "outputs":
            for e, w in enumerate(w_E):
                out[t] += w * (b[e] @ (a[e] @ x[0]))
        else:
            b_mix = torch.stack([w * b[e] for e, w in enumerate(w_E)]).sum(0)
            a_mix = torch.stack([w * a[e] for e, w in enumerate(w_E)]).sum(0)
            out[t] += b_mix @ (a_mix @ x[0])
    return out
