"""RegMean++: RegMean whose activations come from the layers that are merged already.

Nguyen et al., https://arxiv.org/abs/2508.03121, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from experthub.merge._attached_experts import AttachedExperts
from experthub.merge._catalogue import Options
from experthub.merge._coefficients import Coefficients, assign_blocks
from experthub.merge._materials import MergeMaterials
from experthub.merge._merges import merges
from experthub.merge._options import InputsPerStep, Range
from experthub.merge._task_vector import TaskVector
from experthub.merge.regmean import (
    Grams,
    InputStatistics,
    compute_grams,
    find_linear_weights,
    find_transposed,
    solve_regression,
)
from torch import Tensor


def _read_inputs(materials: MergeMaterials, options: Options) -> InputStatistics:
    """Let every expert read the data of its own task, layer by layer through the merged model."""
    data, vectors, weights = materials.paired_data, materials.vectors, materials.weights
    linears = find_linear_weights(data.model, vectors)
    names = {name for vector in vectors for name in vector}
    # With all names of tied weights: their changes may differ.
    parameters = data.model.named_parameters(remove_duplicate=False)
    in_order = [name for name, _ in parameters if name in names]
    label = assign_blocks(in_order, "block")
    blocks = tuple(dict.fromkeys(label.values()))
    experts = len(vectors)
    start = Coefficients(torch.zeros(experts, len(blocks), dtype=torch.float64), blocks, "block")
    grams: list[Grams] = [{} for _ in vectors]
    found = InputStatistics(grams, find_transposed(linears))
    attached = AttachedExperts(data.model, vectors, start, take=lambda name, gradient: None)
    with attached, torch.no_grad():
        for b, block in enumerate(blocks):
            here = [name for name in in_order if label[name] == block]
            for e in range(experts):
                values = torch.zeros_like(start.values)
                values[e, b:] = 1  # the blocks before it are fixed to the merge
                attached.set(values)
                own = {name: linears[name] for name in here if name in linears}
                if own:
                    grams[e] |= compute_grams(data, e, own, options["batch_size"])
            merged = solve_regression(vectors, weights, found, options["off_diagonal"])
            for name in here:
                attached.fix(name, merged[name].dense())
            materials.report("merging layer by layer", b + 1, len(blocks))
    return found


@merges.register(
    paper="https://arxiv.org/abs/2508.03121",
    needs=("data",),
    prepare=_read_inputs,
    keeps_state=False,
    order_dependent=True,
    dense=True,
)
def regmean_plusplus(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    inputs: InputStatistics,
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.95,
    batch_size: Annotated[int, Range(1), InputsPerStep] = 16,
) -> TaskVector:
    """Run RegMean layer by layer: a layer reads the outputs of the merged layers before it.

    The formula is that of `regmean`. `G_e` of a transformer layer is computed while all layers before
    it are merged and the layer itself is that of expert `e`. The data is read once for each layer and
    expert.

    Args:
        vectors: The task vectors of the experts.
        weights: The experts' weights `[E]`.
        inputs: The matrices G of every expert.
        off_diagonal: The factor of the entries off the diagonal of G.
        batch_size: Inputs that are read at once.

    Returns:
        The merged task vector, dense.

    Raises:
        ValueError: The weights sum to zero.
    """
    return solve_regression(vectors, weights, inputs, off_diagonal)
