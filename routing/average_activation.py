"""Average activation: each token goes to the experts whose own tasks' tokens it resembles.

The baseline of Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot
Generalization", https://arxiv.org/abs/2402.05859, section 4.2: PHATGOOSE's router with the mean of
a module's inputs, over examples of the expert's task, in place of a trained gate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from experthub.merge import ExamplesPerTask, Options, Range, ShapesState
from experthub.routing._pool import RouterMaterials, State
from experthub.routing._router import ExpertStack, Router
from experthub.routing._routers import Routing, routers
from experthub.routing._state import StateError, read_tensor
from experthub.routing.phatgoose import phatgoose
from torch import Tensor


def _average(materials: RouterMaterials, options: Options) -> State:
    """Average the inputs of every module over examples of each expert's own tasks."""
    means: dict[str, Tensor] = {}
    for e, label in enumerate(materials.labels):
        materials.report(f"reading examples with {label}", e, len(materials.labels))
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}

        def see(
            name: str,
            x_TI: Tensor,
            sums: dict[str, Tensor] = sums,
            counts: dict[str, Tensor] = counts,
        ) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + x_TI.sum(0).cpu()
            counts[name] = counts.get(name, torch.zeros(())) + len(x_TI)

        materials.read_activations(e, see)
        means |= {f"{e}.{name}": sums[name] / counts[name].clamp(min=1) for name in sums}
    materials.report("reading examples", len(materials.labels), len(materials.labels))
    return State(means)


@routers.register(
    paper="https://arxiv.org/abs/2402.05859",
    needs=("activations",),
    prepare=_average,
    routing=Routing(sparse=True),
)
def average_activation(
    stack: ExpertStack,
    *,
    top_k: Annotated[int, Range(1)] = 2,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    examples: Annotated[int, Range(1), ShapesState, ExamplesPerTask] = 128,
) -> Router:
    """Route tokens by the mean input of each module over examples of the expert's own task.

    The mean inputs are used as the gates of `phatgoose`: every token, at every module, goes to the
    `top_k` experts whose standardised mean input has the largest product with the standardised input.

    Args:
        stack: The experts of a module, with the mean inputs as state.
        top_k: Experts per token and module. A number above that of the experts means all of them.
        temperature: The temperature of the softmax.
        examples: Examples of every expert's own task, read with that expert alone; 1000 in the
            paper.

    Returns:
        The router of the module.
    """
    means = [_read_mean(stack, e) for e in stack.experts]
    gated = replace(stack, gates_EI=torch.stack(means))
    return phatgoose(gated, top_k=top_k, temperature=temperature)


def _read_mean(stack: ExpertStack, expert: int) -> Tensor:
    """Read the mean input `[I]` of one expert; zeros if no example has reached the module."""
    name = f"{expert}.{stack.module}"
    if name not in stack.state:
        if not any(other.startswith(f"{expert}.") for other in stack.state):
            raise StateError(f"the state has no tensors of expert {expert}")
        return torch.zeros(stack.width)
    return read_tensor(stack.state, name, stack.width)
