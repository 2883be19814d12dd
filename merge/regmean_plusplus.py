"""RegMean++: RegMean whose activations come from the layers that are merged already.

Nguyen et al., https://arxiv.org/abs/2508.03121, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from experthub.merge._attached import Attached
from experthub.merge._catalogue import Range
from experthub.merge._coefficients import Coefficients, blocks_of
from experthub.merge._learner import Learner
from experthub.merge._methods import merges
from experthub.merge._task_vector import TaskVector
from experthub.merge.regmean import Grams, grams_of, linear_weights, paired, regressed
from torch import Tensor


@merges.register(
    paper="https://arxiv.org/abs/2508.03121", needs=("data",), order_dependent=True, dense=True
)
def regmean_plusplus(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    learner: Learner,
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.95,
    batch_size: Annotated[int, Range(1)] = 16,
) -> TaskVector:
    """RegMean layer by layer: what a layer reads is the output of the merged layers before it.

    As `regmean`, with `G_e` of each transformer layer taken while all layers before it are merged
    and it is expert `e`'s own.  One pass over the data for each layer and expert.

    off_diagonal: factor of what is off the diagonal of G.
    batch_size: inputs that are read at once.
    """
    data = paired(learner, vectors)
    linears = linear_weights(data.model, vectors)
    names = {name for vector in vectors for name in vector}
    # With all names of tied weights: their changes may differ.
    parameters = data.model.named_parameters(remove_duplicate=False)
    in_order = [name for name, _ in parameters if name in names]
    label = blocks_of(in_order, "block")
    blocks = tuple(dict.fromkeys(label.values()))
    experts = len(vectors)
    start = Coefficients(torch.zeros(experts, len(blocks), dtype=torch.float64), blocks, "block")
    grams: list[Grams] = [{} for _ in vectors]
    with (
        Attached(data.model, vectors, start, take=lambda name, gradient: None) as attached,
        torch.no_grad(),
    ):
        for b, block in enumerate(blocks):
            here = [name for name in in_order if label[name] == block]
            for e in range(experts):
                values = torch.zeros_like(start.values)
                values[e, b:] = 1  # what is before it is fixed to the merge
                attached.set(values)
                own = {name: linears[name] for name in here if name in linears}
                grams[e] |= grams_of(data, e, own, batch_size) if own else {}
            merged = regressed(vectors, weights, linears, grams, off_diagonal)
            for name in here:
                attached.fix(name, merged[name].dense())
            learner.report("merging layer by layer", b + 1, len(blocks))
    return regressed(vectors, weights, linears, grams, off_diagonal)
