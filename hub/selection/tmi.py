"""TMI: the variation of features within the classes of a task, as their conditional entropy.

Xu and Kang, "Fast and Accurate Transferability Measurement by Evaluating Intra-class Feature
Variance", https://arxiv.org/abs/2308.05986. `H(features | class)` is estimated as in the authors'
code, by distances to the k-th nearest neighbour (Kozachenko and Leonenko) in the maximum norm, with
k = 3. There are three deviations from the code:

- The code also divides by the number of classes, which is a constant of the task.
- The code counts classes of one example as 0. Here, all classes of k or fewer examples are omitted.
- The code raises distances below 1.0 to 1.0. Pooled embeddings have length 1, so this would affect
  all distances. Here the smallest distance is 1e-6.

The formula is that of the code; it was not compared with the text of the paper.

Shapes: N examples, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experthub.hub.composition.compose import compose
from experthub.hub.readers.features import Features
from experthub.hub.recipes.plan import Plan
from experthub.hub.selection.candidates import isolate_expert
from experthub.hub.session import Session
from torch import Tensor

NEIGHBOUR = 3  # the k of the k-th nearest neighbour
SMALLEST = 1e-6  # the smallest distance, because equal features have distance 0


def compute_tmi(
    plan: Plan,
    features: Features,
    model: object,
    texts: Sequence[str],
    labels: Sequence[str],
    session: Session,
) -> list[float | None]:
    """Compute the conditional entropy of every expert's features given the class, in nats.

    Args:
        plan: The experts.
        features: The reader of texts.
        model: The base, with which each expert is composed alone.
        texts: Texts of the task.
        labels: The right answer of each text, which is its class.
        session: The store and the progress callback.

    Returns:
        One entropy per expert; None for every expert if no class has more than 3 examples.
    """
    report = session.report
    if not group_by_label(labels):
        needed = f"no answer has {NEIGHBOUR + 1} of {len(labels)} examples"
        report(f"note: tmi compares examples with the same answer, but {needed}", 0, 0)
        return [None] * len(plan.experts)
    found: list[float | None] = []
    for number, expert in enumerate(plan.experts):
        report("composing each expert alone", number, len(plan.experts))
        composed = compose(
            isolate_expert(plan, expert), model=model, session=Session(store=session.store)
        ).model
        found.append(estimate_conditional_entropy(features.compute(composed, texts), labels))
    report("composing each expert alone", len(plan.experts), len(plan.experts))
    return found


def group_by_label(labels: Sequence[str], k: int = NEIGHBOUR) -> list[list[int]]:
    """Group examples by label, and omit labels with k or fewer examples.

    Args:
        labels: The label of each example.
        k: The number of examples that a label must exceed.

    Returns:
        The positions of each label's examples, sorted by label.
    """
    found: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label, []).append(place)
    return [places for _, places in sorted(found.items()) if len(places) > k]


def estimate_conditional_entropy(
    features_ND: Tensor, labels: Sequence[str], k: int = NEIGHBOUR
) -> float:
    """Estimate `H(features | label)` in nats.

    It is the mean of the classes' entropies, weighted by their shares of the examples.

    Args:
        features_ND: The features.
        labels: The label of each example.
        k: The neighbour whose distance is used. Classes of k or fewer examples are omitted.

    Returns:
        The conditional entropy.

    Raises:
        ValueError: No class has more than k examples.
    """
    groups = group_by_label(labels, k)
    if not groups:
        raise ValueError(f"expected a label with more than {k} examples, found none")
    seen = sum(map(len, groups))
    return sum(estimate_entropy(features_ND[rows], k) * len(rows) for rows in groups) / seen


def estimate_entropy(x_ND: Tensor, k: int) -> float:
    """Estimate the differential entropy in nats of a distribution from samples.

    Args:
        x_ND: More than k samples.
        k: The neighbour whose distance is used.

    Returns:
        The entropy.
    """
    n, d = x_ND.shape
    distances_NN = torch.cdist(x_ND.double(), x_ND.double(), p=float("inf"))
    # A point is its own nearest neighbour.
    kth_N = distances_NN.topk(k + 1, largest=False).values[:, k].clamp(min=SMALLEST)
    digamma_n, digamma_k = torch.digamma(torch.tensor([n, k], dtype=torch.double)).tolist()
    return float(digamma_n - digamma_k + d * (2 * kth_N).log().mean())
