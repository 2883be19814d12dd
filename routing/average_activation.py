"""Average activation: each token goes to the experts whose own tasks' tokens it resembles.

The baseline of Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot
Generalization", https://arxiv.org/abs/2402.05859, section 4.2: PHATGOOSE's router with the mean of
a module's inputs, over examples of the expert's task, in place of a trained gate.
"""

from __future__ import annotations

from typing import Annotated

from experthub.merge import Range, Routing
from experthub.routing._methods import routers
from experthub.routing._router import ExpertStack, Router
from experthub.routing.phatgoose import phatgoose


@routers.register(
    paper="https://arxiv.org/abs/2402.05859",
    needs=("activations",),
    learns=True,
    routing=Routing(sparse=True),
)
def average_activation(
    stack: ExpertStack,
    *,
    top_k: Annotated[int, Range(1)] = 2,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    examples: Annotated[int, Range(1)] = 128,
) -> Router:
    """Gates that are no more than the mean input of each module, over examples of the expert's task.

    Otherwise as `phatgoose`: standardised, the `top_k` largest products, softmax weights.

    top_k: experts per token and module, at least 1.  temperature: of the softmax.  examples: of every
    expert's own task, read with that expert alone; 1000 in the paper.
    """
    return phatgoose(stack, top_k=top_k, temperature=temperature)
