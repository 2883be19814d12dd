"""Groups of like experts, for a route between what their groups merge to (MBC).

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
https://arxiv.org/abs/2405.11157, section 3.  Deviations: the cosine is that of the experts' changes
themselves, exact from their factors, where the authors' code has that of a sparse SVD of the
flattened factors; groups are made by average linkage, which has no random start, where they run
k-means on the rows of the matrix; and a group's experts are merged, where they train one on the
tasks of all.

Shapes: E experts, D entries of what they are compared by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from experthub.hub.composition.weights import Contents, gates, task_vector
from experthub.hub.errors import HubError, NotFoundError, UsageError
from experthub.hub.materials.embedder import Embedder
from experthub.hub.readers.features import Features
from experthub.hub.recipes.plan import Plan
from experthub.hub.selection.candidates import candidates
from experthub.hub.selection.likeness import own_embeddings, own_texts
from experthub.hub.selection.written import way_of, write_recipe
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.merge import cosine_matrix, gram_matrix
from experthub.routing import standardised
from torch import Tensor

By = Literal["weights", "gates", "embeddings"]
EXAMPLES = 32


@dataclass(frozen=True)
class Clusters:
    """Experts in groups.

    plan: the experts.  similarity: cosines, a row for each expert.  groups: places of experts in
    the plan, each once, the group of the first one first.
    """

    plan: Plan
    similarity: list[list[float]]
    groups: list[list[int]]

    def within(self, group: Sequence[int]) -> float | None:
        """The mean cosine between different experts of a group; None for a single one."""
        pairs = [self.similarity[e][f] for e in group for f in group if e < f]
        return sum(pairs) / len(pairs) if pairs else None

    def record(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        references = [expert.members[0].reference for expert in self.plan.experts]
        groups = [
            {"experts": [references[e] for e in group], "mean_cosine": self.within(group)}
            for group in self.groups
        ]
        named = {"experts": references, "similarity": self.similarity}
        return {"base": self.plan.base.name, "groups": groups, **named}

    def experts(self, rank: int | None = None) -> list[Any]:
        """The groups as experts of a recipe: a merge each, or the single expert itself.

        rank: of the merges; None keeps their sums exact.
        """
        shortened = {} if rank is None else {"rank": rank}
        entries: list[Any] = []
        for number, group in enumerate(self.groups, 1):
            references = [self.plan.experts[e].members[0].reference for e in group]
            merged = {"merge": {"method": "linear"}, "experts": references, **shortened}
            single = len(references) == 1
            entries.append(references[0] if single else {**merged, "as": f"group-{number}"})
        return entries


def cluster(
    experts: Sequence[str] = (),
    *,
    base: str | None = None,
    k: int = 4,
    by: By = "weights",
    embedder: str = "all-minilm-l6-v2",
    session: Session | None = None,
) -> Clusters:
    """Group experts by the cosines between them, with average linkage.

    Args:
        experts: References. The default is all experts of the base.
        base: The base's reference. The default is the base of the experts.
        k: The number of groups, from 1 to the number of experts.
        by: What is compared: `weights`, the changes of the base's weights; `gates`, the standardised
            gates; or `embeddings`, the mean embedding of examples of the experts' own tasks.
        embedder: The sentence encoder for `embeddings`.
        session: The registry, the store and the progress callback. The default is `Session()`.

    Returns:
        The groups.

    Raises:
        UsageError: k is too large.
        HubError: An expert lacks what is compared.
    """
    session = session or Session()
    plan = candidates(base, experts, session)
    n_experts = len(plan.experts)
    if not 1 <= k <= n_experts:
        raise UsageError(f"{n_experts} experts make no {k} groups", f"say --k 1 to {n_experts}")
    if by == "weights":
        session.report("comparing weights", 0, 0)
        with Contents(plan.members, session.store, gates=False) as contents:
            found = gram_matrix([task_vector(expert, plan, contents) for expert in plan.experts])
    else:
        rows_ED = (
            _gates(plan, session.store) if by == "gates" else _embeddings(plan, embedder, session)
        )
        found = rows_ED.double() @ rows_ED.double().T
    similarity = cosine_matrix(found)
    return Clusters(plan, similarity.tolist(), average_linkage(similarity, k))


def as_by(text: str) -> By:
    """The name of what experts are compared by; UsageError for any other."""
    if text not in get_args(By):
        raise UsageError(f"unknown --by {text!r}", f"use one of {', '.join(get_args(By))}")
    return cast(By, text)


def write_clusters(
    found: Clusters,
    path: Path | str,
    session: Session,
    method: str = "arrow",
    rank: int | None = None,
) -> Plan:
    """Write a recipe that routes between the merged groups.

    Args:
        found: The groups.
        path: The recipe file to write.
        session: The registry, the store and the progress callback.
        method: The router.
        rank: The rank of the merges. None keeps them exact.

    Returns:
        The recipe's plan.

    Raises:
        HubError: The experts lack what the router needs, or one is dense and there is no rank.
    """
    way = way_of(method, routes_only=True)
    recipe = {"base": found.plan.recipe.base, "experts": found.experts(rank), **way}
    why = f"{len(found.plan.experts)} experts in {len(found.groups)} groups of like ones."
    return write_recipe(Path(path), recipe, why, session)


def average_linkage(similarity_EE: Tensor, k: int) -> list[list[int]]:
    """k groups: the two with the highest mean similarity become one, until k are left.

    Of equal ones the first; groups are in the order of their first member.
    """
    groups = [[e] for e in range(len(similarity_EE))]
    sums = similarity_EE.double().clone()
    while len(groups) > k:
        size = torch.tensor([len(group) for group in groups], dtype=torch.double)
        means = sums / (size[:, None] * size)
        upper = means.masked_fill(torch.ones_like(means).tril().bool(), float("-inf"))
        i, j = divmod(int(upper.argmax()), len(groups))
        sums[i] += sums[j]
        sums[:, i] += sums[:, j]
        kept = [row for row in range(len(groups)) if row != j]
        sums = sums[kept][:, kept]
        groups[i] = sorted(groups[i] + groups.pop(j))
    return groups


def _gates(plan: Plan, store: Store) -> Tensor:
    """Every expert's standardised gates `[E, D]`, module by module; zeros where it has none."""
    with Contents(plan.members, store, gates=True) as contents:
        own = [gates(expert, contents) for expert in plan.experts]
    for expert, found in zip(plan.experts, own, strict=True):
        if not found:
            raise HubError(
                f"expert {expert.label} has no gates", "run hub train gate, or say --by weights"
            )
    widths = {name: len(gate) for found in own for name, gate in sorted(found.items())}
    rows = [
        [
            standardised(found[name][None])[0] if name in found else torch.zeros(width)
            for name, width in widths.items()
        ]
        for found in own
    ]
    return torch.stack([torch.cat(row) for row in rows])


def _embeddings(plan: Plan, embedder: str, session: Session) -> Tensor:
    """Embed examples of every expert's own tasks: their means `[E, D]`."""
    features, embed = Features(plan.base), Embedder.load(embedder, session)
    texts = own_texts(plan, lambda task: features.texts(task, EXAMPLES), session.report)
    found = own_embeddings(plan, embed, texts, session.report)
    for expert, embedding in zip(plan.experts, found, strict=True):
        if embedding is None:
            raise NotFoundError(
                f"no example of the task of {expert.label} is here",
                "import its task, or say --by weights",
            )
    return torch.stack([embedding for embedding in found if embedding is not None])
