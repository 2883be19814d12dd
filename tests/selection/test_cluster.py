"""hub cluster: exact similarities, groups by average linkage, and the recipes made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.errors import HubError, UsageError
from experthub.hub.formats.adapter import ADAPTER, GATES
from experthub.hub.selection.clusters import cluster, group_by_average_linkage, write_clusters
from experthub.hub.session import Session
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.merge import (
    Delta,
    Dense,
    LowRank,
    TaskVector,
    cosine_matrix,
    gram_matrix,
    inner_product,
)
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]


def low_rank(seed: int, rank: int, scale: float = 0.7) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    made = torch.randn(16, rank, generator=random, dtype=torch.double)
    return LowRank(made[:9].T, made[9:], scale)


def vector(base: str = "base", **deltas: Delta) -> TaskVector:
    return TaskVector(base, {name: lambda d=delta: d for name, delta in deltas.items()})


def literal_gram(vectors: list[TaskVector]) -> torch.Tensor:
    """Inner products of the dense changes, entry by entry."""
    names = sorted({name for v in vectors for name in v})
    flat = []
    for v in vectors:
        shape = {name: next(o[name].shape for o in vectors if name in o) for name in names}
        parts = [v[n].dense() if n in v else torch.zeros(shape[n]) for n in names]
        flat.append(torch.cat([part.double().flatten() for part in parts]))
    return torch.stack([torch.stack([x @ y for y in flat]) for x in flat])


def test_inner_products_are_the_dense_ones() -> None:
    deltas: list[Delta] = [low_rank(0, 3), low_rank(1, 5, -2.0), Dense(torch.randn(7, 9).double())]
    for x, y in itertools.product(deltas, deltas):
        expected = float((x.dense().double() * y.dense().double()).sum())
        assert inner_product(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    norms = Dense(torch.randn(4)), Dense(torch.randn(4))
    assert inner_product(*norms) == pytest.approx(float(norms[0].d @ norms[1].d), rel=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        inner_product(low_rank(0, 2), Dense(torch.randn(9, 7)))


def test_gram_sums_over_parameters_and_takes_what_is_missing_as_zero() -> None:
    low = [
        vector(p=low_rank(0, 3), q=low_rank(1, 2)),
        vector(p=low_rank(2, 4)),
        vector(q=low_rank(3, 1, -1.5), r=low_rank(4, 2)),
    ]
    torch.testing.assert_close(gram_matrix(low), literal_gram(low), rtol=1e-6, atol=1e-6)
    mixed = [*low, vector(p=Dense(torch.randn(7, 9)), q=low_rank(6, 2))]
    torch.testing.assert_close(gram_matrix(mixed), literal_gram(mixed), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="one base"):
        gram_matrix([low[0], vector(base="other", p=low_rank(0, 1))])


def test_cosines_have_ends() -> None:
    zero = vector(p=LowRank(torch.zeros(2, 9).double(), torch.zeros(7, 2).double()))
    delta = low_rank(5, 3)
    found = cosine_matrix(gram_matrix([vector(p=delta), vector(p=delta.scaled(-3)), zero]))
    expected = [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))


def literal_linkage(similarity: list[list[float]], k: int) -> list[list[int]]:
    groups = [[e] for e in range(len(similarity))]
    while len(groups) > k:
        means = {}
        for g, h in itertools.combinations(range(len(groups)), 2):
            pairs = [similarity[e][f] for e in groups[g] for f in groups[h]]
            means[g, h] = sum(pairs) / len(pairs)
        g, h = max(means, key=means.__getitem__)
        groups[g] = sorted(groups[g] + groups.pop(h))
    return groups


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_average_linkage_is_the_literal_one(k: int) -> None:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(k), dtype=torch.double)
    similarity = cosine_matrix(rows @ rows.T)
    found = group_by_average_linkage(similarity, k)
    assert found == literal_linkage(similarity.tolist(), k)
    assert sorted(e for group in found for e in group) == list(range(8))


def test_equal_similarities_join_the_first() -> None:
    assert group_by_average_linkage(torch.ones(4, 4), 2) == [[0, 1, 2], [3]]


@pytest.fixture
def pool(base_folder: Path, expert_folder: Make) -> dict[str, Any]:
    """Five experts: the second is near the first, the fourth near the third, the fifth alone."""
    folders = [expert_folder(seed, targets=("q_proj", "up_proj")) for seed in (0, 0, 1, 1)]
    for folder in folders[1::2]:
        tensors = load_file(folder / ADAPTER)
        noisy = {n: t + 0.1 * torch.randn(t.shape) for n, t in tensors.items()}
        save_file(noisy, folder / ADAPTER)
    folders.append(expert_folder(2, targets=("q_proj", "down_proj"), rank=6))
    for number, folder in enumerate(folders):
        added = run_hub("add", folder, "--name", f"e{number}", "--base", base_folder)
        assert added.code == 0, added.err
    return {"base": str(base_folder), "folders": folders}


def test_the_similarity_of_experts_is_that_of_their_dense_changes(pool: dict[str, Any]) -> None:
    found = cluster(base=pool["base"], k=3)
    changes = []
    for folder, rank in zip(pool["folders"], (4, 4, 4, 4, 6), strict=True):
        tensors = load_file(folder / ADAPTER)
        names = [n.replace("lora_A", "{}") for n in tensors if "lora_A" in n]
        scale = 2 if rank == 4 else 12 / 6
        changes.append(
            {
                n: scale
                * tensors[n.format("lora_B")].double()
                @ tensors[n.format("lora_A")].double()
                for n in names
            }
        )
    names = sorted({n for own in changes for n in own})
    shapes = {n: own[n].shape for own in changes for n in own}
    flat = [
        torch.cat([own.get(n, torch.zeros(shapes[n])).flatten() for n in names]) for own in changes
    ]
    cosine = torch.nn.functional.cosine_similarity
    expected = [[float(cosine(x, y, 0)) for y in flat] for x in flat]
    for row, literal in zip(found.similarity, expected, strict=True):
        assert row == pytest.approx(literal, abs=1e-6)
    assert found.groups == [[0, 1], [2, 3], [4]]
    assert found.mean_cosine([0, 1]) == pytest.approx(found.similarity[0][1])
    assert found.mean_cosine([4]) is None


def test_similarity_by_gates_is_that_of_standardised_gates(pool: dict[str, Any]) -> None:
    found = cluster(base=pool["base"], k=3, by="gates")
    gates = [load_file(folder / GATES) for folder in pool["folders"]]
    names = sorted({n for own in gates for n in own})
    widths = {n: len(own[n]) for own in gates for n in own}
    norm = torch.nn.functional.layer_norm
    rows = [
        torch.cat(
            [norm(own[n], own[n].shape) if n in own else torch.zeros(widths[n]) for n in names]
        )
        for own in gates
    ]
    for row, x in zip(found.similarity, rows, strict=True):
        expected = [float(torch.nn.functional.cosine_similarity(x, y, 0)) for y in rows]
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("method", "rank"), [("arrow", None), ("phatgoose", 3), ("uniform", 2)])
def test_written_recipes_compose(
    pool: dict[str, Any], method: str, rank: int | None, tmp_path: Path
) -> None:
    found = cluster(base=pool["base"], k=3)
    path = tmp_path / "recipe.yaml"
    plan = write_clusters(found, path, Session(), method, rank)
    assert [expert.label for expert in plan.experts] == ["group-1", "group-2", "e4"]
    assert [len(expert.members) for expert in plan.experts] == [2, 2, 1]
    assert [expert.rank for expert in plan.experts] == [rank, rank, None]
    composition = hub.compose(path)
    assert composition.plan.digest == plan.digest and composition.plan.routed
    with torch.no_grad():
        assert torch.isfinite(composition.model(input_ids=torch.tensor([[5, 9]])).logits).all()


def test_the_command(pool: dict[str, Any], tmp_path: Path) -> None:
    out, plot = tmp_path / "recipe.yaml", tmp_path / "alike.png"
    arguments = ("cluster", "--base", pool["base"], "--k", "3", "--out", out)
    ran = run_hub(*arguments, "--plot", plot, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["schema"] == 1 and found["by"] == "weights" and found["recipe"] == str(out)
    assert [group["experts"] for group in found["groups"]] == [
        ["e0@1", "e1@1"],
        ["e2@1", "e3@1"],
        ["e4@1"],
    ]
    assert found["groups"][2]["mean_cosine"] is None
    assert [row[i] for i, row in enumerate(found["similarity"])] == [1.0] * 5
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run_hub(*arguments).code == 6
    table = run_hub(*arguments, "--force")
    assert table.code == 0 and "group-1" in table.out and "cosines:" in table.out
    first, again = (run_hub(*arguments, "--force", "--json").out for _ in range(2))
    assert first == again == ran.out


def test_errors(pool: dict[str, Any], expert_folder: Make, tmp_path: Path) -> None:
    base = ("--base", pool["base"])
    tiny_bert(tmp_path / "encoder")
    encoder = ("--embedder", str(tmp_path / "encoder"))
    cases: list[tuple[tuple[str, ...], int, str]] = [
        ((*base, "--k", "6"), 2, "cannot form 6 groups from 5 experts"),
        ((*base, "--by", "weight"), 2, "unknown --by 'weight'"),
        ((*base, "--method", "arow"), 2, "did you mean"),
        ((*base, "--method", "linear"), 2, "there is no router 'linear'"),
        (("nobody",), 4, "nobody"),
        ((*base, "--k", "2", "--plot", str(tmp_path)), 2, "is not a file"),
        ((*base, "--k", "2", "--plot", "a.yaml", "--out", "./a.yaml"), 2, "are both a.yaml"),
        (
            ("e0", "e1", "--k", "1", "--by", "embeddings", *encoder),
            4,
            "no example of the task of e0",
        ),
    ]
    for arguments, code, words in cases:
        ran = run_hub("cluster", *arguments)
        assert (ran.code, words in ran.err) == (code, True), (arguments, ran.err)
        assert len(ran.lines("error:")) == 1 == len(ran.lines("hint:")), (arguments, ran.err)
    bare = expert_folder(5, gates=False)
    with pytest.raises(HubError, match="has no gates"):
        cluster(["e0", str(bare)], base=pool["base"], k=1, by="gates")
    with pytest.raises(UsageError, match="cannot form 0 groups"):
        cluster(["e0"], base=pool["base"], k=0)


def test_by_embeddings_of_the_experts_own_tasks(base_folder: Path, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "encoder")
    for number, words in enumerate(("cat dog", "cat dog", "??? !!!")):
        examples = []
        for n in range(30):
            text, choices = f"{words} {n} {number}", ["yes", "no"]
            examples.append(
                Example(id=example_id(text, choices), input=text, choices=choices, answer=n % 2)
            )
        task = write_task("made", Card(name=f"t{number}", source="made-up"), examples)
        folder = make_expert(tmp_path / f"x{number}", base_folder, number)
        where = ("--base", base_folder, "--task", task)
        assert run_hub("add", folder, "--name", f"x{number}", *where).code == 0
    found = cluster(k=2, by="embeddings", base=str(base_folder), embedder=str(tmp_path / "encoder"))
    assert found.groups == [[0, 1], [2]]
