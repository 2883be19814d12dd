"""Embeddings that experts change, merged row by row, and the gradients of the coefficients.

Only the rows that inputs look up are merged and stored. The other rows have no effect on the output
and no gradient.

Shapes: E experts, B blocks, V rows and O columns of an embedding, U distinct rows in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from experthub.merge._merged_parameters import AttachedParameter, Use
from torch import Tensor, nn


class EmbeddingRows:
    """The merged rows `W0[v] + sum_e c[e] tau_e[v]` of an embedding, for the rows that are looked up.

    The rows of a batch are one leaf of the autograd graph.
    """

    def __init__(self, changed: AttachedParameter, halves: bool) -> None:
        """Add forward hooks to embeddings.

        Args:
            changed: The embedding's weight and the experts that change it.
            halves: Keep the changes as bfloat16.
        """
        self.vectors, self.name, self.block = changed.vectors, changed.name, changed.block
        self.here = torch.tensor(changed.here)
        self.base_VO = getattr(*changed.uses[0]).detach()
        device = self.base_VO.device
        self.place_V = torch.full((len(self.base_VO),), -1, device=device)
        dtype = torch.bfloat16 if halves else self.base_VO.dtype
        # The operating system allocates a page when it is first written, so rows that are never read
        # use no memory.
        self.stack_EVO = torch.empty(
            len(self.here), *self.base_VO.shape, dtype=dtype, device=device
        )
        self.seen = 0
        self.factors = torch.zeros(len(self.here)).to(self.base_VO)
        self.sums: Tensor | None = None
        self._hooks = [module.register_forward_hook(self._forward) for module, _ in changed.uses]

    @staticmethod
    def is_looked_up_only(uses: Sequence[Use]) -> bool:
        """Return whether modules only look up rows of their parameter, without any other operation.

        Args:
            uses: The modules that hold the parameter.

        Returns:
            True if all are embeddings without `max_norm` and `scale_grad_by_freq`.
        """
        return all(
            type(m) is nn.Embedding and m.max_norm is None and not m.scale_grad_by_freq
            for m, _ in uses
        )

    def set(self, values: Tensor) -> None:
        """Use some coefficients from the next forward pass on.

        Args:
            values: The coefficients of all experts and blocks, `[E, B]`.
        """
        self.factors = values.detach()[self.here, self.block].to(self.base_VO)
        self.sums = None

    def _forward(self, module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Replace the output of the embedding by rows of the merged weight."""
        rows_U, places = torch.unique(inputs[0], return_inverse=True)
        self._load_rows(rows_U[self.place_V[rows_U] < 0])
        at_U = self.place_V[rows_U]
        leaf_UO = self.base_VO[rows_U]
        for factor, tau_VO in zip(self.factors, self.stack_EVO, strict=True):
            leaf_UO.add_(tau_VO[at_U].to(leaf_UO.dtype) * factor)
        padding = None
        if module.padding_idx is not None:  # The padding row is read but gets no gradient.
            padding = next(iter((rows_U == module.padding_idx).nonzero()[:, 0].tolist()), None)
        if torch.is_grad_enabled():
            leaf_UO.requires_grad_()
            leaf_UO.register_post_accumulate_grad_hook(partial(self._take_gradient, at_U))
        return nn.functional.embedding(places, leaf_UO, padding)

    def _load_rows(self, rows: Tensor) -> None:
        """Load the experts' changes of rows that have not been looked up before."""
        if not len(rows):
            return
        new = slice(self.seen, self.seen + len(rows))
        self.place_V[rows] = torch.arange(new.start, new.stop, device=rows.device)
        for tau_VO, vector in zip(self.stack_EVO, self.vectors, strict=True):
            dense_VO = vector[self.name].dense()
            tau_VO[new] = dense_VO[rows.to(dense_VO.device)].to(tau_VO)
        self.seen = new.stop

    def _take_gradient(self, at_U: Tensor, leaf: Tensor) -> None:
        """Add the inner products of the rows' gradient and the changes, and free the gradient."""
        if leaf.grad is None:
            return
        flat = leaf.grad.reshape(-1)
        products = [
            torch.dot(tau_VO[at_U].reshape(-1).to(flat.dtype), flat) for tau_VO in self.stack_EVO
        ]
        found = torch.stack(products).double()
        self.sums = found if self.sums is None else self.sums + found
        leaf.grad = None

    def add_gradient(self, total: Tensor) -> None:
        """Add the gradient of this parameter's coefficients to that of all coefficients.

        Args:
            total: The gradient of all coefficients, `[E, B]`; changed in place.
        """
        if self.sums is not None:
            total[self.here, self.block] += self.sums.to(total)

    def detach(self) -> None:
        """Remove the forward hooks."""
        for hook in self._hooks:
            hook.remove()
