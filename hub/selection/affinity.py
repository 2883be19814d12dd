"""Affinities of a task's texts and experts: the weights that routers would give in one base pass.

Shapes: T tokens, I inputs of a module, P experts at a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from experthub.hub.composition.stacking import load_change
from experthub.hub.composition.weights import Contents, load_gates, load_task_vector
from experthub.hub.readers.features import Features, watch_inputs
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.merge import LowRank, is_linear
from experthub.routing import ExpertStack, Router, arrow, compute_scores, phatgoose
from torch import Tensor, nn

ExpertScores = list[float | None]
TINY = 1e-12  # the smallest weight in a logarithm, because a softmax can underflow to 0
ROUTERS: Mapping[str, Callable[..., Router]] = {"gates": phatgoose, "prototypes": arrow}


@dataclass
class Probe:
    """A router over all experts of one module that sums their weights over tokens.

    Args:
        router: The router.
        experts: The positions of the module's experts in the plan.
        total_P: The weights `[P]`, summed over tokens.
        tokens: The number of tokens read so far.
    """

    router: Router
    experts: tuple[int, ...]
    total_P: Tensor
    tokens: int = 0

    def reset(self) -> None:
        """Set the sums to zero."""
        self.total_P.zero_()
        self.tokens = 0

    def update(self, x_TI: Tensor) -> None:
        """Add the weights of more tokens.

        Args:
            x_TI: Inputs of the module.
        """
        probes_PI = self.router.probes_PI
        if probes_PI is not None:
            probes_PI = probes_PI.to(x_TI.device)
        scores_TP = compute_scores(x_TI, probes_PI, self.router.layer_norm)
        weights_TP = self.router.weights(scores_TP).dense(len(self.experts))
        self.total_P += weights_TP.sum(0).double().cpu()
        self.tokens += len(x_TI)


def compute_affinities(
    plan: Plan,
    features: Features,
    model: nn.Module,
    texts: Sequence[str],
    others: Sequence[Sequence[str]],
    measures: Sequence[str],
    session: Session,
) -> dict[str, ExpertScores]:
    """Compute every expert's mean routing weight over tokens and modules; chance level is 1.

    Each weight is multiplied by the number of experts at its module. Only the base reads the texts.

    Args:
        plan: The experts.
        features: The reader of texts.
        model: The base.
        texts: Texts of the task.
        others: Texts of other tasks, one sequence per task. If there are any, a weight is divided
            by the geometric mean of the expert's weights on those tasks.
        measures: `gates`, `prototypes` or both.
        session: The store and the progress callback.

    Returns:
        By measure, one score per expert; None for an expert that lacks what the measure reads:
        gates, or a low-rank change.
    """
    probes = _build_probes(plan, model, measures, session.store)
    if not probes:
        return {measure: [None] * len(plan.experts) for measure in measures}
    modules = {name: model.get_submodule(name) for name in probes}

    def observe(name: str, x_TI: Tensor) -> None:
        for own in probes[name].values():
            own.update(x_TI)

    def average_weights(read: Sequence[str]) -> dict[str, ExpertScores]:
        for own in probes.values():
            for probe in own.values():
                probe.reset()
        with watch_inputs(modules, features, observe):
            features.compute(model, read)
        return {
            measure: _average_probes(
                [own[measure] for own in probes.values() if measure in own], len(plan.experts)
            )
            for measure in measures
        }

    found, usual = average_weights(texts), []
    for number, read in enumerate(others, 1):
        usual.append(average_weights(read))
        session.report("reading examples of the experts' own tasks", number, len(others))
    if not usual:
        return found
    return {
        measure: [
            None
            if score is None
            else score / _compute_geometric_mean([row[measure][e] for row in usual])
            for e, score in enumerate(scores)
        ]
        for measure, scores in found.items()
    }


def _compute_geometric_mean(scores: ExpertScores) -> float:
    """Compute the geometric mean of scores; values that underflow count as a tiny one."""
    return math.exp(sum(math.log(max(score or 0, TINY)) for score in scores) / len(scores))


def _build_probes(
    plan: Plan, model: nn.Module, measures: Sequence[str], store: Store
) -> dict[str, dict[str, Probe]]:
    """Build the probes by module and measure; a module gets none if no expert suits the measure."""
    found: dict[str, dict[str, Probe]] = {}
    with Contents(plan.members, store, gates="gates" in measures) as contents:
        vectors = [load_task_vector(expert, plan, contents) for expert in plan.experts]
        gates_of = [load_gates(e, contents) if "gates" in measures else {} for e in plan.experts]
        low = [e for e, expert in enumerate(plan.experts) if expert.low_rank]
        for parameter in plan.parameters:
            name = parameter.removesuffix(".weight")
            module = model.get_submodule(name) if name != parameter else None
            here = [e for e in low if parameter in vectors[e].load]
            if not here or module is None or not is_linear(module):
                continue
            deltas = {e: load_change(name, module, vectors[e], 1.0) for e in here}
            gated = {e: gates_of[e][name] for e in here if name in gates_of[e]}
            for measure, experts in {"prototypes": here, "gates": list(gated)}.items():
                if measure in measures and experts:
                    probe = _build_probe(
                        measure, {e: deltas[e] for e in experts}, gated, len(vectors)
                    )
                    found.setdefault(name, {})[measure] = probe
    return found


def _build_probe(
    measure: str, deltas: Mapping[int, LowRank], gates: Mapping[int, Tensor], n_experts: int
) -> Probe:
    """Build the probe of one module for a measure."""
    own = gates if measure == "gates" else None
    router = ROUTERS[measure](ExpertStack.of(deltas, n_experts, own), top_k=n_experts)
    return Probe(router, tuple(deltas), torch.zeros(len(deltas), dtype=torch.double))


def _average_probes(probes: Sequence[Probe], n_experts: int) -> ExpertScores:
    """Average every expert's weight over the modules where it has a probe; None without a probe."""
    sums, counts = [0.0] * n_experts, [0] * n_experts
    for probe in (probe for probe in probes if probe.tokens):
        for e, total in zip(probe.experts, probe.total_P.tolist(), strict=True):
            sums[e] += total / probe.tokens * len(probe.experts)
            counts[e] += 1
    return [total / n if n else None for total, n in zip(sums, counts, strict=True)]
