"""The kernel `all`: one product with the A of all experts, and one with all B of a module.

Shapes: T tokens, G modules, E experts, N rows of A of all modules and experts, J rows of B of one
module, O outputs of that module.
"""

from __future__ import annotations

from experthub.merge import Combine
from experthub.routing._packed import PackedExperts
from torch import Tensor


def weigh_all(z_TN: Tensor, weights: Tensor, packed: PackedExperts, combine: Combine) -> Tensor:
    """Multiply `A x` of all experts by the experts' weights.

    Args:
        z_TN: The products `A x` `[T, N]`.
        weights: The weights `[E]`, or `[T, G, E]` with G either 1 or the number of modules.
        packed: The experts.
        combine: What is mixed, `outputs` or `parameters`. For `parameters`, `A x` is mixed first,
            and the B of each expert gets that mixture.

    Returns:
        The weighted products `[T, N]`.
    """
    n_modules, n_experts, rank = len(packed.b), len(packed.experts), packed.a.rank
    w = weights.expand(*weights.shape[:-2], n_modules, n_experts).flatten(-2).to(z_TN.dtype)
    if packed.owner_N is not None:
        return z_TN * w.index_select(-1, packed.owner_N)
    z, w = z_TN.view(len(z_TN), n_modules * n_experts, rank), w.unsqueeze(-1)
    z = z * w
    if combine == "parameters":
        shape = len(z), n_modules, n_experts, rank
        z = z.view(shape).sum(2, keepdim=True).expand(shape).flatten(1, 2) * w
    return z.flatten(1)


def add_all(y_TO: Tensor, z_TJ: Tensor, b_JO: Tensor) -> None:
    """Add `B z` of all experts of one module, in place.

    Args:
        y_TO: Outputs of the base `[T, O]`, which are changed.
        z_TJ: The weighted products `[T, J]` of the module, as `weigh_all` returns them.
        b_JO: The rows of B `[J, O]`, in any float dtype.
    """
    y_TO.addmm_(z_TJ, b_JO.to(y_TO.dtype))
