"""Best individual: the one expert that does best on some labelled examples, for every input."""

from __future__ import annotations

import torch
from experthub.merge import Options
from experthub.routing._pool import Pool, RouterMaterials, Select, State, one_hot
from experthub.routing._router import Weights
from experthub.routing._routers import Routing, routers
from experthub.routing._state import read_tensor


def _score(materials: RouterMaterials, options: Options) -> State:
    """Measure the accuracy of every expert alone on the recipe's data, averaged over its tasks."""
    scores, answers = [], materials.read_answers()
    for e, label in enumerate(materials.labels):
        materials.report(f"reading examples with {label}", e, len(materials.labels))
        logits = materials.read_logits(e)
        shares = [
            float((found_NC.argmax(-1).cpu() == right_N.cpu()).float().mean())
            for found_NC, right_N in zip(logits, answers, strict=True)
        ]
        scores.append(sum(shares) / len(shares))
    materials.report("reading examples", len(materials.labels), len(materials.labels))
    return State({"scores": torch.tensor(scores)})


@routers.register(
    paper="https://arxiv.org/abs/2402.05859",
    needs=("data",),
    prepare=_score,
    needs_labels=lambda options: True,
    routing=Routing("nothing", "model", sparse=True, zero_shot=False),
)
def best_individual(pool: Pool) -> Select:
    """Use the expert with the highest accuracy on the recipe's data, averaged over its tasks.

    This is the paper's "best individual" when the data is that of the tasks to be measured.

    Args:
        pool: The experts, with their accuracies as state.

    Returns:
        The weights of every input: 1 for the best expert.
    """
    scores_E = read_tensor(pool.state, "scores", pool.n_experts)
    weights = Weights(one_hot(int(scores_E.argmax()), pool.n_experts))
    return lambda batch: weights
