"""Objectives of learned merges: losses of logits over the choices of a task.

Shapes: B examples, C choices, V views of an input, N inputs of a task. An example that has fewer
than C choices has logits of minus infinity for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -1e4  # The softmax of this logit is zero, and so is its gradient.


def compute_log_probabilities(logits_BC: Tensor) -> Tensor:
    """Compute log-probabilities that are finite for every choice.

    Args:
        logits_BC: Logits `[..., C]` of any float dtype. Those below -10000 count as -10000.

    Returns:
        Log-probabilities `[..., C]`, in float64 for float64 logits and in float32 otherwise.
    """
    wide = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return wide.clamp(min=LOWEST).log_softmax(-1)


def entropy(logits_BC: Tensor) -> Tensor:
    """Compute the mean entropy of predictions.

    Yang et al., https://arxiv.org/abs/2310.02575, eq. 5.

    Args:
        logits_BC: Logits `[B, C]`.

    Returns:
        A scalar, in nats.
    """
    log_BC = compute_log_probabilities(logits_BC)
    return -(log_BC.exp() * log_BC).sum(-1).mean()


def marginal_entropy(views_VBC: Tensor) -> Tensor:
    """Compute the mean entropy of predictions that are averaged over views of an input.

    MEMO: Zhang et al., https://arxiv.org/abs/2110.09506, eq. 2.

    Args:
        views_VBC: Logits `[V, B, C]` of V views of each input.

    Returns:
        A scalar, in nats.
    """
    log_VBC = compute_log_probabilities(views_VBC)
    marginal_BC = log_VBC.logsumexp(0) - torch.tensor(float(len(views_VBC))).log()
    return -(marginal_BC.exp() * marginal_BC).sum(-1).mean()


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Compute the mean negative log-probability of the right choices.

    Args:
        logits_BC: Logits `[B, C]`.
        labels_B: The right choices `[B]`, from 0 to C - 1.

    Returns:
        A scalar, in nats.
    """
    return -compute_log_probabilities(logits_BC).gather(-1, labels_B[:, None]).mean()


def fixmatch(
    weak_BC: Tensor, strong_BC: Tensor, trusted_B: Tensor, pseudo_B: Tensor, confidence: float
) -> Tensor:
    """Compute the FixMatch loss: cross-entropy of the strong views against pseudo-labels.

    Sohn et al., https://arxiv.org/abs/2001.07685, eq. 3 and 4. Trusted inputs replace the labelled
    inputs, as in aTLAS (https://arxiv.org/abs/2407.02880, section 5.2).

    Args:
        weak_BC: Logits `[B, C]` of the weak views; they get no gradient.
        strong_BC: Logits `[B, C]` of the strong views.
        trusted_B: The inputs that use the given pseudo-label, a mask `[B]`. The others use the
            prediction for the weak view if it is confident, and otherwise add zero.
        pseudo_B: The given pseudo-labels `[B]`.
        confidence: The probability, from 0 to 1, from which a prediction is confident.

    Returns:
        A scalar: the mean over trusted inputs plus the mean over the others.
    """
    with torch.no_grad():
        sure_B, own_B = compute_log_probabilities(weak_BC).exp().max(-1)
    target_B = torch.where(trusted_B, pseudo_B, own_B)
    loss_B = -compute_log_probabilities(strong_BC).gather(-1, target_B[:, None])[:, 0]
    counted_B = trusted_B | (sure_B >= confidence)
    known = (loss_B * trusted_B).sum() / trusted_B.sum().clamp(min=1)
    free_B = ~trusted_B
    return known + (loss_B * (counted_B & free_B)).sum() / free_B.sum().clamp(min=1)


def choose_trusted(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the inputs whose zero-shot predictions are used as labels.

    For each predicted class, these are the `min(N / C / 10, 100)` most confident inputs, and at
    least one (https://arxiv.org/abs/2407.02880, section 5.2).

    Args:
        logits_NC: Zero-shot logits `[N, C]`.

    Returns:
        Which inputs are trusted `[N]`, and the predicted classes of all inputs `[N]`.
    """
    sure_N, label_N = compute_log_probabilities(logits_NC).max(-1)
    count = max(1, min(int(logits_NC.shape[0] / logits_NC.shape[1] / 10), 100))
    chosen_N = torch.zeros_like(label_N, dtype=torch.bool)
    for label in sorted(set(label_N.tolist())):
        rows = (label_N == label).nonzero()[:, 0]
        chosen_N[rows[sure_N[rows].argsort(descending=True, stable=True)[:count]]] = True
    return chosen_N, label_N
