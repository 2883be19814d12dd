"""TMI: how much features vary within the classes of a task, by their conditional entropy.

Xu and Kang, "Fast and Accurate Transferability Measurement by Evaluating Intra-class Feature
Variance", https://arxiv.org/abs/2308.05986, as in the authors' code: `H(features | class)` by
distances to the k-th nearest neighbour (Kozachenko and Leonenko) in the maximum norm, k = 3.  Three
deviations: the code divides by the number of classes as well, a constant of the task; it counts
single examples as 0, which are left out here with all classes of k or fewer; and it takes no
distance below 1.0, which would be all of them here, for pooled embeddings have length 1: here that
is 1e-6.  The formula is that of the code; the text of the paper was not compared.

Shapes: N examples, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experthub.hub.composition.compose import compose
from experthub.hub.readers.features import Features
from experthub.hub.recipes.plan import Plan
from experthub.hub.selection.candidates import alone
from experthub.hub.session import Session
from torch import Tensor

NEIGHBOUR = 3
SMALLEST = 1e-6


def tmi(
    plan: Plan,
    features: Features,
    model: object,
    texts: Sequence[str],
    labels: Sequence[str],
    session: Session,
) -> list[float | None]:
    """Compute for every expert the conditional entropy of its features given the class, in nats.

    Args:
        plan: The experts.
        features: The reader of texts.
        model: The base, with which each expert is composed alone.
        texts: Texts of the task.
        labels: The right answers, which are the classes.
        session: The store and the progress callback.

    Returns:
        One entropy per expert; None for all of them if no class has enough examples.
    """
    report = session.report
    if not classes(labels):
        needed = f"no answer has {NEIGHBOUR + 1} of {len(labels)} examples"
        report(f"note: tmi compares examples with the same answer, and {needed}", 0, 0)
        return [None] * len(plan.experts)
    found: list[float | None] = []
    for number, expert in enumerate(plan.experts):
        report("composing one expert after the other", number, len(plan.experts))
        composed = compose(
            alone(plan, expert), model=model, session=Session(store=session.store)
        ).model
        found.append(conditional_entropy(features.of(composed, texts), labels))
    report("composing one expert after the other", len(plan.experts), len(plan.experts))
    return found


def classes(labels: Sequence[str], k: int = NEIGHBOUR) -> list[list[int]]:
    """The places of every label that more than k examples have."""
    found: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label, []).append(place)
    return [places for _, places in sorted(found.items()) if len(places) > k]


def conditional_entropy(features_ND: Tensor, labels: Sequence[str], k: int = NEIGHBOUR) -> float:
    """`H(features | label)` in nats: that of every class, weighted by its share of the examples.

    Raises ValueError where no class has more than k examples.
    """
    groups = classes(labels, k)
    if not groups:
        raise ValueError(f"expected a label with more than {k} examples, found none")
    seen = sum(map(len, groups))
    return sum(entropy(features_ND[rows], k) * len(rows) for rows in groups) / seen


def entropy(x_ND: Tensor, k: int) -> float:
    """The differential entropy in nats of what N > k points were drawn from."""
    n, d = x_ND.shape
    distances_NN = torch.cdist(x_ND.double(), x_ND.double(), p=float("inf"))
    # A point is its own nearest neighbour.
    kth_N = distances_NN.topk(k + 1, largest=False).values[:, k].clamp(min=SMALLEST)
    digamma_n, digamma_k = torch.digamma(torch.tensor([n, k], dtype=torch.double)).tolist()
    return float(digamma_n - digamma_k + d * (2 * kth_N).log().mean())
