"""Groups of similar experts, for a route between the merged groups (MBC).

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
https://arxiv.org/abs/2405.11157, section 3. There are three deviations from the paper:

- The cosine is exact, between the experts' changes of the weights. The authors' code flattens the
  factors and compares a sparse SVD of them.
- Groups are formed by average linkage, which has no random start. The authors run k-means on the
  rows of the similarity matrix.
- The experts of a group are merged. The authors train one expert on the tasks of the group.

Shapes: E experts, D entries of the vectors that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from experthub.hub.bases.base_sources import find
from experthub.hub.composition.weights import Contents, load_gates, load_task_vector
from experthub.hub.errors import HubError, NotFoundError, UsageError
from experthub.hub.files.spelling import check_choice
from experthub.hub.materials.sentence_encoder import SentenceEncoder
from experthub.hub.readers.features import Features
from experthub.hub.recipes.plan import Plan
from experthub.hub.selection.candidates import plan_candidates
from experthub.hub.selection.embeddings import embed_own_tasks, read_own_texts
from experthub.hub.selection.recipe_writing import build_method_entry, write_recipe
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.merge import cosine_matrix, gram_matrix
from experthub.routing import standardise
from torch import Tensor

ComparedBy = Literal["weights", "gates", "embeddings"]
EXAMPLES = 32  # per task, for `embeddings`


@dataclass(frozen=True)
class Clusters:
    """A partition of experts into groups of similar ones.

    Args:
        plan: The experts.
        similarity: The cosines between experts, as `[expert][expert]`, from -1 to 1.
        groups: The positions in the plan of each group's experts. Every expert is in one group, and
            the groups are in the order of their first experts.
    """

    plan: Plan
    similarity: list[list[float]]
    groups: list[list[int]]

    def mean_cosine(self, group: Sequence[int]) -> float | None:
        """Compute the mean cosine between the different experts of a group.

        Args:
            group: The positions of the group's experts in the plan.

        Returns:
            The mean, from -1 to 1; None for a single expert.
        """
        pairs = [self.similarity[e][f] for e in group for f in group if e < f]
        return sum(pairs) / len(pairs) if pairs else None

    def record(self) -> dict[str, Any]:
        """Return the groups and similarities as plain values, for `--json`.

        Returns:
            A record with `base`, `groups` (their experts and mean cosines), `experts` and
            `similarity`.
        """
        references = [expert.members[0].reference for expert in self.plan.experts]
        groups = [
            {"experts": [references[e] for e in group], "mean_cosine": self.mean_cosine(group)}
            for group in self.groups
        ]
        named = {"experts": references, "similarity": self.similarity}
        return {"base": self.plan.base.name, "groups": groups, **named}

    def build_experts(self, rank: int | None = None) -> list[Any]:
        """Build the `experts:` of a recipe: a nested merge for every group of several experts.

        Args:
            rank: The rank of the merges. None keeps them exact.

        Returns:
            One entry per group; a group of one expert is the expert itself.
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
    by: ComparedBy = "weights",
    embedder: str = "all-minilm-l6-v2",
    session: Session | None = None,
) -> Clusters:
    """Group similar experts by the cosines between them, with average linkage.

    Args:
        experts: References. The default is all experts of the base.
        base: The base's reference. The default is the base of the experts.
        k: The number of groups, from 1 to the number of experts.
        by: The property that is compared: `weights`, the changes of the base's weights; `gates`,
            the standardised gates; or `embeddings`, the mean embedding of examples of the experts' own
            tasks.
        embedder: The sentence encoder for `embeddings`.
        session: The registry, the store and the progress callback. The default is `Session()`.

    Returns:
        The groups.

    Raises:
        UsageError: k is not between 1 and the number of experts.
        NotFoundError: An expert does not exist, or the task of an expert is not imported.
        HubError: An expert has no gates.

    Example:
        from experthub import hub

        found = hub.cluster(["sentiment", "intent-recognition", "question-typing"], k=2)
        print(found.groups, found.similarity)
    """
    session = session or Session()
    plan = plan_candidates(base, experts, session)
    n_experts = len(plan.experts)
    if not 1 <= k <= n_experts:
        raise UsageError(
            f"cannot form {k} groups from {n_experts} experts", f"set --k between 1 and {n_experts}"
        )
    if by == "weights":
        session.report("comparing weights", 0, 0)
        with Contents(plan.members, session.store, gates=False) as contents:
            found = gram_matrix(
                [load_task_vector(expert, plan, contents) for expert in plan.experts]
            )
    else:
        rows_ED = (
            _stack_gates(plan, session.store)
            if by == "gates"
            else _embed_experts(plan, embedder, session)
        )
        found = rows_ED.double() @ rows_ED.double().T
    similarity = cosine_matrix(found)
    return Clusters(plan, similarity.tolist(), group_by_average_linkage(similarity, k))


def parse_similarity(text: str) -> ComparedBy:
    """Check the name of what experts are compared by.

    Args:
        text: The name.

    Returns:
        The same name.

    Raises:
        UsageError: The name is unknown.
    """
    check_choice(text, get_args(ComparedBy), "--by")
    return cast(ComparedBy, text)


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
    recipe = {
        "base": found.plan.recipe.base,
        "experts": found.build_experts(rank),
        **build_method_entry(method, routes_only=True),
    }
    comment = f"{len(found.plan.experts)} experts in {len(found.groups)} groups of similar experts."
    return write_recipe(Path(path), recipe, comment, session)


def group_by_average_linkage(similarity_EE: Tensor, k: int) -> list[list[int]]:
    """Form k groups: join the two groups with the highest mean similarity until k are left.

    If several pairs are equally similar, the first one is joined.

    Args:
        similarity_EE: The similarities between experts.
        k: The number of groups, from 1 to the number of experts.

    Returns:
        The positions of each group's experts. The groups are in the order of their first experts.
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


def _stack_gates(plan: Plan, store: Store) -> Tensor:
    """Stack the standardised gates of the experts `[E, D]`; a missing gate becomes zeros."""
    with Contents(plan.members, store, gates=True) as contents:
        own = [load_gates(expert, contents) for expert in plan.experts]
    for expert, found in zip(plan.experts, own, strict=True):
        if not found:
            raise HubError(
                f"expert {expert.label} has no gates",
                "train its gates with hub train gate, or pass --by weights",
            )
    widths = {name: len(gate) for found in own for name, gate in sorted(found.items())}
    rows = [
        [
            standardise(found[name][None])[0] if name in found else torch.zeros(width)
            for name, width in widths.items()
        ]
        for found in own
    ]
    return torch.stack([torch.cat(row) for row in rows])


def _embed_experts(plan: Plan, embedder: str, session: Session) -> Tensor:
    """Compute the mean embedding of examples of every expert's own tasks `[E, D]`."""
    features, embed = Features(plan.base), SentenceEncoder.load(find(embedder, session))
    texts = read_own_texts(plan, lambda task: features.texts(task, EXAMPLES), session.report)
    found = embed_own_tasks(plan, embed, texts, session.report)
    for expert, embedding in zip(plan.experts, found, strict=True):
        if embedding is None:
            raise NotFoundError(
                f"no example of the task of {expert.label} is available",
                "import its task with hub tasks import, or pass --by weights",
            )
    return torch.stack([embedding for embedding in found if embedding is not None])
