"""Arrow: each token goes to the experts whose weights it excites most, with no training and no data.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
https://arxiv.org/abs/2405.11157, section 4.2. The prototypes are exact singular vectors, computed
from the factors alone; those of peft come from 15 steps of a power iteration with a random start.
The token is not normalised, as in the paper's code and in peft.

General-knowledge subtraction: Bagherifard et al., "GenKnowSub: Improving Modularity and Reusability
of LLMs through General Knowledge Subtraction", https://arxiv.org/abs/2505.10939, as in peft.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Annotated

import torch
from experthub.merge import (
    ExpertOutline,
    LateOption,
    LowRank,
    MethodError,
    MethodFailure,
    Options,
    Outline,
    Range,
    ShapesExperts,
)
from experthub.routing._router import ExpertStack, Router, TopK
from experthub.routing._routers import Routing, routers
from torch import Tensor


def subtract_general(stack: ExpertStack, general: Collection[int]) -> ExpertStack:
    """Subtract the mean factors of the general experts from the factors of the others.

    The factors are subtracted, whatever their scales, and not the changes `B A`: those would add up
    to a higher rank.

    Args:
        stack: All experts of a module.
        general: The positions of the general experts in the recipe.

    Returns:
        A stack of the other experts.

    Raises:
        ValueError: A general expert does not adapt the module, no other expert does, or ranks differ.
    """
    others = [e for e in stack.experts if e not in general]
    if not others or not set(general) <= set(stack.experts):
        raise ValueError(
            f"expected general experts {sorted(general)} and others, found {[*stack.experts]}"
        )
    if not stack.equal_ranks:
        raise ValueError("subtracting general experts needs experts of one rank")
    a_RI = torch.stack([stack.deltas[e].a for e in general]).mean(0)
    b_OR = torch.stack([stack.deltas[e].b for e in general]).mean(0)
    left = {e: stack.deltas[e] for e in others}
    deltas = {e: LowRank(d.a - a_RI, d.b - b_OR, d.scale) for e, d in left.items()}
    rows = [place for place, e in enumerate(stack.experts) if e in left]
    gates_EI = None if stack.gates_EI is None else stack.gates_EI[rows]
    return replace(stack, deltas=deltas, gates_EI=gates_EI)


def _adapt(stack: ExpertStack, options: Options) -> ExpertStack:
    """Subtract the general experts that the option `gks` names, if it names any."""
    named = options["gks"] or ()
    general = tuple(e for e, label in enumerate(stack.labels) if label in named)
    return subtract_general(stack, general) if general else stack


def _check(outline: Outline, options: Options) -> None:
    """Refuse general experts that cannot be subtracted from the others."""
    named = options["gks"]
    if not named:
        return
    labels = [expert.label for expert in outline.experts]
    for name in named:
        if labels.count(name) != 1:
            count = labels.count(name) or "no"
            raise MethodError(
                f"gks: the recipe has {count} {'experts' if name in labels else 'expert'} "
                f"named {name!r}",
                _hint_for(name, labels),
            )
    general = [expert for expert in outline.experts if expert.label in named]
    others = [expert for expert in outline.experts if expert.label not in named]
    if not others:
        raise MethodError(
            "gks names all experts, so no expert is left to route to", "remove one name from gks:"
        )
    for expert in outline.experts:
        if expert.is_merge:
            raise MethodError(
                f"gks: {expert.label} is a merge, without factors A and B of its own",
                "replace the merge by its experts",
            )
    for expert in general:
        if expert.weight != 1:
            raise MethodError(
                f"gks: the general expert {expert.label} has the weight {expert.weight:g}, but "
                "general experts are averaged without weights",
                f"remove weight: from {expert.label}",
            )
    for parameter in outline.parameters:
        _check_parameter(parameter, general, others)
        module, ranks = parameter.removesuffix(".weight"), outline.describe_ranks(parameter)
        if ranks is not None:
            raise MethodFailure(
                f"gks needs one rank, and {module} has {ranks}", f"exclude {module} with targets:"
            )


def _hint_for(name: str, labels: Sequence[str]) -> str:
    """Suggest how to correct a name that does not stand for exactly one expert."""
    if name in labels:
        return "give each of them a different name with as:"
    close = get_close_matches(name, sorted(labels), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(sorted(labels))}"


def _check_parameter(
    parameter: str, general: Sequence[ExpertOutline], others: Sequence[ExpertOutline]
) -> None:
    """Refuse a parameter that the general experts and the others do not change alike."""
    module = parameter.removesuffix(".weight")
    if all(expert.rank_of(parameter) is None for expert in others):
        raise MethodFailure(
            f"only general experts adapt {module}", f"exclude {module} with targets:"
        )
    for expert in general:
        if expert.rank_of(parameter) is None:
            raise MethodFailure(
                f"the general expert {expert.label} does not adapt {module}, and others do",
                f"exclude {module} with targets:, or use another general expert",
            )


@routers.register(
    paper="https://arxiv.org/abs/2405.11157",
    routing=Routing(sparse=True),
    adapt=_adapt,
    check=_check,
)
def arrow(
    stack: ExpertStack,
    *,
    top_k: Annotated[int, Range(1)] = 3,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    gks: Annotated[list[str] | None, ShapesExperts, LateOption] = None,
) -> Router:
    """Route tokens by prototypes: the input direction that each expert's weights amplify most.

    Every token, at every module, goes to the `top_k` experts with the largest `|x . v_e|`, where
    `v_e` is the first right singular vector of `B_e A_e`. The weights are a softmax of these values.

    Args:
        stack: The experts of a module.
        top_k: Experts per token and module; 3 as in peft. A number above that of the experts means
            all of them, as in the authors' code.
        temperature: The temperature of the softmax.
        gks: General-knowledge subtraction: the recipe's names of general experts. Their mean A and
            mean B are subtracted from the A and B of every other expert. Scales are ignored.
            Prototypes are computed afterwards. No token goes to general experts.

    Returns:
        The router of the module.
    """
    prototypes = torch.stack([_compute_prototype(delta) for delta in stack.deltas.values()])
    return TopK(prototypes / temperature, top_k, absolute=True)


def _compute_prototype(delta: LowRank) -> Tensor:
    """Compute the first right singular vector of `B A`, `[I]`; zeros if the change is zero.

    Its sign is arbitrary. With `A^T = Q R` it is Q times the first eigenvector of `R B^T B R^T`:
    `O((O + I) r^2)`.
    """
    a_rI, b_Or = delta.a.double(), delta.b.double()
    if not bool(torch.isfinite(a_rI).all() and torch.isfinite(b_Or).all()):
        raise MethodFailure("the factors of an expert overflow float32", "use smaller weights")
    q_Ir, r_rr = torch.linalg.qr(a_rI.T)
    half = b_Or @ r_rr.T
    values, vectors = torch.linalg.eigh(half.T @ half)
    found: Tensor = q_Ir @ vectors[:, -1] * bool(values[-1] > 0)
    return found.float()
