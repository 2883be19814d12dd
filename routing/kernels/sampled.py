"""The kernel `sampled`: a sampled dense-dense product with A, and a weighted sum of rows of B.

It suits many tokens, because it copies no rows for a token. It needs float32 on a CPU.

Shapes: T tokens, I inputs and O outputs of a module, k experts per token and module, K experts per
token in all modules of a group, J rows of A or B per token.
"""

from __future__ import annotations

import warnings
from functools import cache
from threading import Lock

import torch
from experthub.routing._expert_rows import ExpertRows
from torch import Tensor, nn

_first = Lock()  # The filters of warnings belong to the process.


def _silence_csr_warning() -> None:
    """Make one CSR tensor silently: at the first one, torch warns that the layout is in beta."""
    with _first:
        _make_csr_once()


@cache
def _make_csr_once() -> None:
    """Make a CSR tensor while warnings are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(0, dtype=torch.long)
        torch.sparse_csr_tensor(none.new_zeros(1), none, torch.zeros(0), size=(0, 0))


def multiply_sampled(x_TI: Tensor, rows: Tensor, places_TJ: Tensor) -> Tensor:
    """Multiply each token with some rows of a matrix, as a sampled dense-dense product.

    Args:
        x_TI: Inputs `[T, I]` in float32.
        rows: A matrix `[., I]` in float32.
        places_TJ: The positions of each token's rows in the matrix `[T, J]`.

    Returns:
        The products `[T, J]`.
    """
    _silence_csr_warning()
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


def multiply_chosen(x_TI: Tensor, a: ExpertRows, experts_TK: Tensor) -> Tensor:
    """Compute `A x` of the experts that each token chose.

    Args:
        x_TI: Inputs `[T, I]` in float32.
        a: The rows of A.
        experts_TK: The chosen experts `[T, K]`, as positions in `a`.

    Returns:
        The products `[T, J]`.
    """
    return multiply_sampled(x_TI, *a.locate(experts_TK, x_TI.dtype))


def add_chosen(y_TO: Tensor, z_TJ: Tensor, b: ExpertRows, experts_Tk: Tensor) -> None:
    """Add `B z` of the experts that each token chose, in place.

    Args:
        y_TO: Outputs of the base `[T, O]`, which are changed.
        z_TJ: The weighted products `A x` `[T, J]`.
        b: The rows of B of one module.
        experts_Tk: The chosen experts `[T, k]`, as positions in `b`.
    """
    rows, places = b.locate(experts_Tk, z_TJ.dtype)
    y_TO.add_(nn.functional.embedding_bag(places, rows, per_sample_weights=z_TJ, mode="sum"))
