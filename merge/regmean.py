"""RegMean: the linear weights that come closest to every expert's outputs on its own inputs.

Jin et al., https://arxiv.org/abs/2212.09849, section 3.

Shapes: N rows of activations, O and I features of a linear module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from experthub.merge._attached_experts import AttachedExperts
from experthub.merge._catalogue import MethodFailure, Options
from experthub.merge._coefficients import make_zero_coefficients
from experthub.merge._delta import Dense
from experthub.merge._linear_modules import is_plain_linear, is_transposed
from experthub.merge._materials import Data, MergeMaterials, compute_logits
from experthub.merge._merges import merges
from experthub.merge._options import InputsPerStep, Range
from experthub.merge._task_vector import TaskVector, combine, normalize_weights
from torch import Tensor, nn

Grams = dict[str, Tensor]  # parameter name -> [I, I]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """The inputs of the linear modules, as each expert sees them.

    Args:
        grams: Per expert, the mean outer product of each module's inputs, in double precision.
        transposed: The parameters that are stored `[I, O]`.
    """

    grams: Sequence[Grams]
    transposed: frozenset[str]


def _read_inputs(materials: MergeMaterials, options: Options) -> InputStatistics:
    """Let every expert read the data of its own task."""
    data, vectors = materials.paired_data, materials.vectors
    linears = find_linear_weights(data.model, vectors)
    start = make_zero_coefficients(len(vectors))
    with AttachedExperts(data.model, vectors, start) as attached, torch.no_grad():
        grams = []
        for e in range(len(vectors)):
            attached.set(torch.eye(len(vectors), dtype=torch.float64)[e][:, None])
            grams.append(compute_grams(data, e, linears, options["batch_size"]))
            materials.report("reading activations", e + 1, len(vectors))
    return InputStatistics(grams, find_transposed(linears))


@merges.register(
    paper="https://arxiv.org/abs/2212.09849",
    needs=("data",),
    prepare=_read_inputs,
    keeps_state=False,
    order_dependent=True,
    dense=True,
)
def regmean(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    inputs: InputStatistics,
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.9,
    batch_size: Annotated[int, Range(1), InputsPerStep] = 16,
) -> TaskVector:
    """Regress every linear weight onto all experts' outputs in closed form, and average the rest.

    The merged change is `(sum_e w_e G_e)^-1 sum_e w_e G_e tau_e`. `G_e` is the mean outer product of
    the module's inputs when expert `e` reads the data of its own task: `data.tasks` has one task for
    each expert, in their order. Labels are not used.

    Args:
        vectors: The task vectors of the experts.
        weights: The experts' weights `[E]`.
        inputs: The matrices G of every expert.
        off_diagonal: The factor of the entries off the diagonal of G, the paper's alpha. The paper
            uses 0.9 for most models.
        batch_size: Inputs that are read at once.

    Returns:
        The merged task vector, dense.

    Raises:
        ValueError: The weights sum to zero.
    """
    return solve_regression(vectors, weights, inputs, off_diagonal)


def find_linear_weights(model: nn.Module, vectors: Sequence[TaskVector]) -> dict[str, nn.Module]:
    """Find the linear modules whose weights the experts change.

    Args:
        model: The model.
        vectors: The task vectors of the experts.

    Returns:
        Parameter name -> module, in the model's order.
    """
    changed = {name for vector in vectors for name in vector}
    found = ((f"{name}.weight", module) for name, module in model.named_modules())
    return {n: module for n, module in found if n in changed and is_plain_linear(module)}


def find_transposed(linears: Mapping[str, nn.Module]) -> frozenset[str]:
    """Find the parameters that are stored `[I, O]`.

    Args:
        linears: Parameter name -> linear module.

    Returns:
        The names of these parameters.
    """
    return frozenset(name for name, module in linears.items() if is_transposed(module))


def compute_grams(
    data: Data, task: int, linears: Mapping[str, nn.Module], batch_size: int
) -> Grams:
    """Average the outer products of every module's inputs over the data of a task.

    Args:
        data: Inputs, and the model that reads them.
        task: The position of the task.
        linears: Parameter name -> linear module.
        batch_size: Inputs that are read at once.

    Returns:
        Parameter name -> `[I, I]` in double precision; padding is left out.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x_NI = _real_rows(inputs[0], data.real).double()
        sums[name] = sums.get(name, 0) + x_NI.T @ x_NI
        rows[name] = rows.get(name, 0) + len(x_NI)

    with _watch(linears, watch):
        for start in range(0, data.sizes[task], batch_size):
            end = min(start + batch_size, data.sizes[task])
            compute_logits(data, task, torch.arange(start, end))
    return {name: (total / rows[name]).cpu() for name, total in sums.items()}


def _real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """Flatten activations `[..., I]` to `[N, I]`, without those of padding."""
    if real is not None and real.shape == x.shape[:-1]:
        return x[real]
    return x.reshape(-1, x.shape[-1])


@contextmanager
def _watch(linears: Mapping[str, nn.Module], watch: Callable[..., None]) -> Iterator[None]:
    """Call a function with the inputs of every module while the block lasts."""
    hooks = [module.register_forward_hook(partial(watch, name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def solve_regression(
    vectors: Sequence[TaskVector], weights: Tensor, inputs: InputStatistics, off_diagonal: float
) -> TaskVector:
    """Solve the regression lazily where there are activations, and average elsewhere.

    Args:
        vectors: The task vectors of the experts.
        weights: The experts' weights `[E]`.
        inputs: The matrices G of every expert.
        off_diagonal: The factor of the entries off the diagonal of G.

    Returns:
        The merged task vector.

    Raises:
        ValueError: The weights sum to zero.
    """
    mean = combine(vectors, normalize_weights(weights))

    def compute_change(name: str) -> Dense:
        grams = [gram[name] for gram in inputs.grams]
        transposed = name in inputs.transposed
        return _solve(name, transposed, vectors, weights, grams, off_diagonal)

    load = {n: partial(compute_change, n) if n in inputs.grams[0] else mean.load[n] for n in mean}
    return TaskVector(mean.base, load, mean.seed)


def _solve(
    name: str,
    transposed: bool,
    vectors: Sequence[TaskVector],
    weights: Tensor,
    grams_II: Sequence[Tensor],
    off_diagonal: float,
) -> Dense:
    """Solve the regression of one linear weight, stored `[I, O]` if it is transposed.

    An expert that does not change the weight asks for the base's outputs.
    """
    shape, dtype = next((v[name].shape, v[name].dtype) for v in vectors if name in v)
    left_II = torch.zeros_like(grams_II[0])
    right_IO = left_II.new_zeros(len(left_II), shape[1] if transposed else shape[0])
    for vector, weight, gram_II in zip(vectors, weights.tolist(), grams_II, strict=True):
        scaled_II = gram_II * off_diagonal
        scaled_II.diagonal().copy_(gram_II.diagonal())
        left_II += weight * scaled_II
        if name in vector:
            delta = vector[name].dense().double()
            right_IO += weight * scaled_II @ (delta if transposed else delta.T)
    # Features that no input has leave the equations without a unique answer.
    left_II.diagonal().add_(1e-8 * left_II.diagonal().mean().clamp(min=1e-30))
    try:
        found_IO = torch.linalg.solve(left_II, right_IO)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise MethodFailure(
            f"the regression of {name} has no single solution",
            "use positive weights, or more examples",
        ) from None
    return Dense((found_IO if transposed else found_IO.T).to(dtype).contiguous())
