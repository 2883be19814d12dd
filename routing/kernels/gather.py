"""The kernel `gather`: copy the rows of A and B of the experts that each token chose.

It suits few tokens, because it copies rows for every token.

Shapes: T tokens, I inputs and O outputs of a module, k experts per token and module, K experts per
token in all modules of a group, J rows of A or B per token.
"""

from __future__ import annotations

import torch
from experthub.routing._expert_rows import ExpertRows
from torch import Tensor

FEW_TOKENS = 16  # The number of tokens up to which copies for every token may be faster.


def multiply_own_rows(x_TI: Tensor, rows: Tensor) -> Tensor:
    """Multiply each token with rows of its own.

    Args:
        x_TI: Inputs `[T, I]`.
        rows: The rows `[T J, I]`, token after token.

    Returns:
        The products `[T, J, 1]`.
    """
    (n_tokens, width), count = x_TI.shape, rows.shape[0]
    own = rows.view(n_tokens, count // max(n_tokens, 1), width)
    return torch.bmm(own, x_TI.unsqueeze(-1))


def multiply_gathered(x_TI: Tensor, a: ExpertRows, experts_TK: Tensor) -> Tensor:
    """Compute `A x` of the experts that each token chose.

    Args:
        x_TI: Inputs `[T, I]`.
        a: The rows of A.
        experts_TK: The chosen experts `[T, K]`, as positions in `a`.

    Returns:
        The products `[T, J, 1]`.
    """
    return multiply_own_rows(x_TI, a.gather(experts_TK.reshape(-1), x_TI.dtype))


def add_gathered(y_TO: Tensor, z_TJ: Tensor, b: ExpertRows, experts_Tk: Tensor) -> None:
    """Add `B z` of the experts that each token chose, in place.

    Args:
        y_TO: Outputs of the base `[T, O]`, which are changed.
        z_TJ: The weighted products `A x` `[T, J]`.
        b: The rows of B of one module.
        experts_Tk: The chosen experts `[T, k]`, as positions in `b`.
    """
    rows = b.gather(experts_Tk.reshape(-1), z_TJ.dtype)
    if y_TO.shape[0] == 1:
        y_TO.addmm_(z_TJ, rows)
    else:
        y_TO.unsqueeze(1).baddbmm_(z_TJ.unsqueeze(1), rows.view(*z_TJ.shape, y_TO.shape[1]))
