"""RegMean: the linear weights that come closest to every expert's outputs on its own inputs.

Jin et al., https://arxiv.org/abs/2212.09849, section 3.

Shapes: N rows of activations, O and I features of a linear module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from experthub.merge._attached import Attached
from experthub.merge._catalogue import Range
from experthub.merge._coefficients import Coefficients
from experthub.merge._delta import Dense
from experthub.merge._learner import Data, Learner, logits_of
from experthub.merge._methods import merges
from experthub.merge._task_vector import TaskVector, combine
from torch import Tensor, nn

Grams = dict[str, Tensor]  # parameter name -> [I, I]


@merges.register(
    paper="https://arxiv.org/abs/2212.09849", needs=("data",), order_dependent=True, dense=True
)
def regmean(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    learner: Learner,
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.9,
    batch_size: Annotated[int, Range(1)] = 16,
) -> TaskVector:
    """Closed-form regression of every linear weight onto all experts' outputs; the rest averaged.

    `tau = (sum_e w_e G_e)^-1 sum_e w_e G_e tau_e`, where `G_e` is the mean outer product of the
    module's inputs when expert `e` reads the data of its own task: `data.tasks` has one for each
    expert, in their order.  Labels are not used.

    off_diagonal: factor of what is off the diagonal of G, the paper's alpha: .9 for most models.
    batch_size: inputs that are read at once.
    """
    data = paired(learner, vectors)
    linears = linear_weights(data.model, vectors)
    with Attached(data.model, vectors, one_block(len(vectors))) as attached, torch.no_grad():
        grams = []
        for e in range(len(vectors)):
            attached.set(torch.eye(len(vectors), dtype=torch.float64)[e][:, None])
            grams.append(grams_of(data, e, linears, batch_size))
            learner.report("reading activations", e + 1, len(vectors))
    return regressed(vectors, weights, linears, grams, off_diagonal)


def paired(learner: Learner, vectors: Sequence[TaskVector]) -> Data:
    """The data, when it has one task for each expert."""
    data = learner.given
    if len(data.tasks) != len(vectors):
        raise ValueError(
            f"expected one task for each of the {len(vectors)} experts, in their order, "
            f"found {len(data.tasks)}"
        )
    return data


def one_block(experts: int) -> Coefficients:
    """Coefficients that take whole experts."""
    return Coefficients(torch.zeros(experts, 1, dtype=torch.float64), ("model",), "task")


def linear_weights(model: nn.Module, vectors: Sequence[TaskVector]) -> dict[str, nn.Module]:
    """Parameter name -> linear module, of what the experts change, in the model's order."""
    changed = {name for vector in vectors for name in vector}
    found = ((f"{name}.weight", module) for name, module in model.named_modules())
    return {
        name: module
        for name, module in found
        if name in changed and type(module).__name__ in ("Linear", "Conv1D")
    }


def grams_of(data: Data, task: int, linears: Mapping[str, nn.Module], batch_size: int) -> Grams:
    """The mean outer product of every module's inputs over a task's data, in double precision."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x_NI = _real_rows(inputs[0], data.real).double()
        sums[name] = sums.get(name, 0) + x_NI.T @ x_NI
        rows[name] = rows.get(name, 0) + len(x_NI)

    with _watched(linears, watch):
        for start in range(0, data.sizes[task], batch_size):
            logits_of(data, task, torch.arange(start, min(start + batch_size, data.sizes[task])))
    return {name: total / rows[name] for name, total in sums.items()}


def _real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """Activations `[..., I]` as `[N, I]`, without those of padding."""
    if real is not None and real.shape == x.shape[:-1]:
        return x[real]
    return x.reshape(-1, x.shape[-1])


@contextmanager
def _watched(linears: Mapping[str, nn.Module], watch: Callable[..., None]) -> Iterator[None]:
    hooks = [module.register_forward_hook(partial(watch, name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def regressed(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    linears: Mapping[str, nn.Module],
    grams: Sequence[Grams],
    off_diagonal: float,
) -> TaskVector:
    """The regression where there are activations, and the weighted mean elsewhere, made lazily."""
    total = weights.sum()
    if abs(float(total)) < 1e-8:
        raise ValueError(f"expected weights with a sum other than 0, found {weights.tolist()}")
    mean = combine(vectors, weights / total)

    def at(name: str) -> Dense:
        here = [gram[name] for gram in grams]
        conv = type(linears[name]).__name__ == "Conv1D"
        return _solved(name, conv, vectors, weights, here, off_diagonal)

    load = {n: partial(at, n) if n in grams[0] else mean.load[n] for n in mean}
    return TaskVector(mean.base, load, mean.seed)


def _solved(
    name: str,
    conv: bool,
    vectors: Sequence[TaskVector],
    weights: Tensor,
    grams_II: Sequence[Tensor],
    off_diagonal: float,
) -> Dense:
    """One linear weight's regression; an expert that does not change it wants the base's outputs.

    conv: whether the weight is stored as `[I, O]`.
    """
    shape, dtype = next((v[name].shape, v[name].dtype) for v in vectors if name in v)
    left_II = torch.zeros_like(grams_II[0])
    right_IO = left_II.new_zeros(len(left_II), shape[1] if conv else shape[0])
    for vector, weight, gram_II in zip(vectors, weights.tolist(), grams_II, strict=True):
        scaled_II = gram_II * off_diagonal
        scaled_II.diagonal().copy_(gram_II.diagonal())
        left_II += weight * scaled_II
        if name in vector:
            delta = vector[name].dense().double()
            right_IO += weight * scaled_II @ (delta if conv else delta.T)
    # Features that no input has leave the equations without a unique answer.
    left_II.diagonal().add_(1e-8 * left_II.diagonal().mean().clamp(min=1e-30))
    found_IO = torch.linalg.solve(left_II, right_IO)
    return Dense((found_IO if conv else found_IO.T).to(dtype).contiguous())
