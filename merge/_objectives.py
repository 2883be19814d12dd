"""What learned merges minimise: losses of logits over the label set.

Shapes: B examples, C choices; a logit of minus infinity marks what is no choice of an example.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -1e4  # its softmax is zero, and so is its gradient


def log_probabilities(logits_BC: Tensor) -> Tensor:
    """`[B, C]`, finite everywhere, in float32 or wider."""
    wide = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return wide.clamp(min=LOWEST).log_softmax(-1)


def entropy(logits_BC: Tensor) -> Tensor:
    """Mean entropy of the predictions (Yang et al., https://arxiv.org/abs/2310.02575, eq. 5)."""
    log_BC = log_probabilities(logits_BC)
    return -(log_BC.exp() * log_BC).sum(-1).mean()


def marginal_entropy(views_VBC: Tensor) -> Tensor:
    """Mean entropy of the prediction averaged over views of an input.

    MEMO (Zhang et al., https://arxiv.org/abs/2110.09506, eq. 2).  views: `[V, B, C]` logits.
    """
    log_VBC = log_probabilities(views_VBC)
    marginal_BC = log_VBC.logsumexp(0) - torch.tensor(float(len(views_VBC))).log()
    return -(marginal_BC.exp() * marginal_BC).sum(-1).mean()


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean negative log-probability of the right choices."""
    return -log_probabilities(logits_BC).gather(-1, labels_B[:, None]).mean()


def fixmatch(
    weak_BC: Tensor, strong_BC: Tensor, trusted_B: Tensor, pseudo_B: Tensor, confidence: float
) -> Tensor:
    """Cross-entropy of a strong view against trusted pseudo-labels, and against own confident ones.

    FixMatch (Sohn et al., https://arxiv.org/abs/2001.07685, eq. 3 and 4), with trusted samples in
    the labelled part's place as aTLAS has it (https://arxiv.org/abs/2407.02880, section 5.2).
    trusted: which of the B take the pseudo-label given; the others take the weak view's
    prediction where its probability is at least `confidence`, and count as zero elsewhere.
    """
    with torch.no_grad():
        sure_B, own_B = log_probabilities(weak_BC).exp().max(-1)
    target_B = torch.where(trusted_B, pseudo_B, own_B)
    loss_B = -log_probabilities(strong_BC).gather(-1, target_B[:, None])[:, 0]
    counted_B = trusted_B | (sure_B >= confidence)
    known = (loss_B * trusted_B).sum() / trusted_B.sum().clamp(min=1)
    free_B = ~trusted_B
    return known + (loss_B * (counted_B & free_B)).sum() / free_B.sum().clamp(min=1)


def choose_trusted(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Which inputs to trust `[N]`, and their pseudo-labels `[N]`, from zero-shot logits.

    Of each predicted class the `min(N / C / 10, 100)` most confident, at least one
    (https://arxiv.org/abs/2407.02880, section 5.2).
    """
    sure_N, label_N = log_probabilities(logits_NC).max(-1)
    count = max(1, min(int(logits_NC.shape[0] / logits_NC.shape[1] / 10), 100))
    chosen_N = torch.zeros(len(label_N), dtype=torch.bool)
    for label in sorted(set(label_N.tolist())):
        rows = (label_N == label).nonzero()[:, 0]
        chosen_N[rows[sure_N[rows].argsort(descending=True, stable=True)[:count]]] = True
    return chosen_N, label_N
