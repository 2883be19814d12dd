"""Arrow: each token goes to the experts whose weights it excites most, with no training and no data.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
https://arxiv.org/abs/2405.11157, section 4.2.  The prototypes are exact singular vectors, from the
factors alone; peft's come from 15 steps of a power iteration with a random start.  Neither the
paper's code nor peft's normalises the token, and neither do we.

General-knowledge subtraction is of Bagherifard et al., "GenKnowSub: Improving Modularity and
Reusability of LLMs through General Knowledge Subtraction", https://arxiv.org/abs/2505.10939, as peft
has it.  A stack comes here with it done: `ExpertStack.less`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from experthub.merge import LowRank, Range, Routing
from experthub.routing._methods import routers
from experthub.routing._router import ExpertStack, Router, TopK
from torch import Tensor


@routers.register(paper="https://arxiv.org/abs/2405.11157", routing=Routing(sparse=True))
def arrow(
    stack: ExpertStack,
    *,
    top_k: Annotated[int, Range(1)] = 3,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    gks: list[str] | None = None,
) -> Router:
    """Prototypes of the experts' own weights: the input direction that each of them amplifies most.

    Every token, at every module, goes to the `top_k` experts with the largest `|x . v_e|`, v_e the
    first right singular vector of `B_e A_e`; softmax weights. Needs nothing but the experts.

    top_k: experts per token and module, at least 1; 3 as in peft, and more than there are means all,
    as in the authors' code.  temperature: of the softmax.  gks: general-knowledge subtraction, the
    recipe's names of general experts: the mean of their A and that of their B are taken off every
    other's A and B, whatever the scales, before prototypes are; no token goes to them.
    """
    prototypes = torch.stack([_prototype(delta) for delta in stack.deltas.values()])
    return TopK(prototypes / temperature, top_k, absolute=True)


def _prototype(delta: LowRank) -> Tensor:
    """The first right singular vector of `B A` `[I]`, zeros if it is zero; its sign is arbitrary.

    With `A^T = Q R` it is Q times the first eigenvector of `R B^T B R^T`: `O((O + I) r^2)`.
    """
    a_rI, b_Or = delta.a.double(), delta.b.double()
    q_Ir, r_rr = torch.linalg.qr(a_rI.T)
    half = b_Or @ r_rr.T
    values, vectors = torch.linalg.eigh(half.T @ half)
    found: Tensor = q_Ir @ vectors[:, -1] * bool(values[-1] > 0)
    return found.float()
