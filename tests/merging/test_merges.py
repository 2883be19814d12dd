"""TIES and DARE against literal versions of their papers, and what both promise besides."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEARS, logits
from experthub import hub
from experthub.hub.errors import HubError
from experthub.merge import Delta, Dense, LowRank, TaskVector, combine, dare, merges, ties
from experthub.merge.ties import find_threshold, keep_agreeing, trim
from safetensors.torch import load_file
from torch import Tensor

Make = Callable[..., Path]
SHAPES = {"a.weight": (30, 20), "b.weight": (7, 11), "c.bias": (9,)}


def vector(tensors: dict[str, Tensor], seed: str = "") -> TaskVector:
    return TaskVector("base", {n: (lambda t=t: Dense(t)) for n, t in tensors.items()}, seed)


def random_tensors(count: int = 3, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Experts of unequal sizes, also between tensors; the last lacks `b.weight`."""
    random = torch.Generator().manual_seed(0)
    made = []
    for e in range(count):
        tensors = {
            name: torch.randn(shape, generator=random).to(dtype) * (1 + e) * 3**place
            for place, (name, shape) in enumerate(SHAPES.items())
        }
        if e == count - 1 > 0:
            del tensors["b.weight"]
        made.append(tensors)
    return made


def dense(merged: TaskVector) -> dict[str, Tensor]:
    return {name: merged[name].dense() for name in merged}


def row(*values: float, dtype: torch.dtype = torch.float32) -> TaskVector:
    return vector({"w": torch.tensor(values, dtype=dtype)})


def literal_trim(tau: Tensor, density: float) -> Tensor:
    """Keep the top k by sorting; no two magnitudes are equal here."""
    order = tau.abs().argsort(descending=True)
    kept = torch.zeros_like(tau)
    k = max(1, int(density * tau.numel()))
    kept[order[:k]] = tau[order[:k]]
    return kept


def literal_ties(
    taus: Sequence[dict[str, Tensor]], weights: Sequence[float], density: float, scope: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """The disjoint sum, and the weights in it, from concatenated vectors and a loop over entries."""
    cut = []
    for tau in taus:
        names = [n for n in SHAPES if n in tau]
        flat = torch.cat([tau[n].flatten() for n in names])
        sizes = [tau[n].numel() for n in names]
        if scope == "model":
            parts = list(literal_trim(flat, density).split(sizes))
        else:
            parts = [literal_trim(part, density) for part in flat.split(sizes)]
        cut.append(dict(zip(names, parts, strict=True)))
    found = {}
    for name, shape in SHAPES.items():
        size = torch.zeros(shape).numel()
        total, share = torch.zeros(size, dtype=torch.float64), torch.zeros(size)
        for p in range(size):
            column = [
                (w, float(t[name][p])) for w, t in zip(weights, cut, strict=True) if name in t
            ]
            gamma = sum(w * x for w, x in column)
            agree = [(w, x) for w, x in column if w * x * gamma > 0]
            total[p] = sum(w * x for w, x in agree)
            share[p] = sum(abs(w) for w, x in agree)
        found[name] = (total.view(shape), share.view(shape))
    return found


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.25), (0.0, 1.0, -1.0)])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0])
def test_ties_is_the_paper(
    scope: Any, normalize: bool, weights: tuple[float, ...], density: float
) -> None:
    taus = random_tensors()
    options: dict[str, Any] = {"density": density, "trim_scope": scope, "normalize": normalize}
    merged = dense(ties([vector(t) for t in taus], torch.tensor(weights), scale=0.7, **options))
    assert list(merged) == list(SHAPES)
    for name, (total, share) in literal_ties(taus, weights, density, scope).items():
        expected = 0.7 * (total / torch.where(share == 0, 1, share) if normalize else total)
        torch.testing.assert_close(merged[name], expected, atol=1e-12, rtol=1e-7)


def mergekit(tau_EN: Tensor, w_E1: Tensor, density: float) -> Tensor:
    """Its formula for one tensor with `normalize: true`: an elected zero is plus, shares are signed."""
    wd = torch.stack([literal_trim(tau, density) for tau in tau_EN]) * w_E1
    majority = (wd.sum(0) >= 0) * 2 - 1
    m = wd.sign() == majority
    share = (w_E1 * m).sum(0)
    return (wd * m).sum(0) / torch.where(share == 0, 1, share)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_by_tensor_is_mergekit_for_positive_weights(density: float) -> None:
    tau_EN = torch.randn(4, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.tensor([0.3, 1.0, 0.7, 2.0])
    merged = ties([row(*t, dtype=t.dtype) for t in tau_EN], weights, density=density,
                  trim_scope="tensor")  # fmt: skip
    expected = mergekit(tau_EN, weights.double()[:, None], density)
    torch.testing.assert_close(merged["w"].dense(), expected, atol=1e-12, rtol=1e-6)


def test_sign_election() -> None:
    """Exact cancellation, a negative weight, an expert of weight 0, and one expert alone."""

    def at(vectors: list[TaskVector], weights: list[float], **options: Any) -> list[float]:
        merged = ties(vectors, torch.tensor(weights), density=1.0, **options)
        found: list[float] = merged["w"].dense().tolist()
        return found

    pair = [row(1, 2, -3), row(-1, 4, 1)]
    assert at(pair, [1, 1]) == [0, 3, -3]
    assert at(pair, [1, 1], normalize=False) == [0, 6, -3]
    assert at(pair, [1, -1]) == [1, -4, -2]  # of w tau: 1 and 1, 2 and -4, -3 and -1
    assert at(pair, [1, 0]) == [1, 2, -3]
    assert at(pair[:1], [-0.25]) == [-1, -2, 3]
    assert at(pair[:1], [-0.25], normalize=False, scale=2) == [-0.5, -1, 1.5]
    # In float32, 1e8 and 1 cancel or not, as they are ordered.
    large = [row(1e8), row(1.0), row(-1e8)]
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        assert at([large[e] for e in order], [1, 1, 1], normalize=False) == [100000000]


def test_scopes_differ_where_tensors_differ_in_size() -> None:
    tau = vector({"small": torch.arange(1.0, 11), "large": torch.arange(101.0, 111)})
    kept = {}
    for scope in ("model", "tensor"):
        found = dense(ties([tau], torch.ones(1), density=0.5, trim_scope=scope))  # type: ignore[arg-type]
        kept[scope] = [int(found[name].count_nonzero()) for name in ("small", "large")]
    assert kept == {"model": [0, 10], "tensor": [5, 5]}


def test_equal_magnitudes_at_the_limit_are_all_kept() -> None:
    found = ties([row(1, -2, 2, 2, 5)], torch.ones(1), density=0.4)["w"].dense()
    assert found.tolist() == [0, -2, 2, 2, 5]


VALUES = {
    "random": lambda: torch.randn(5000) * 1e-3,
    "wide": lambda: torch.exp(torch.randn(3000) * 20),
    "constant": lambda: torch.full((1000,), -0.125),
    "zero": lambda: torch.zeros(1000),
    "mostly zero": lambda: torch.cat([torch.zeros(900), torch.randn(100)]),
    "one": lambda: torch.tensor([3.5]),
    "denormal": lambda: torch.randn(1000) * 1e-41,
    "tiny and zero": lambda: torch.cat([torch.zeros(50), torch.full((50,), 1e-45)]),
    "few values": lambda: torch.randint(-3, 4, (4000,)).float(),
    "negative zero": lambda: torch.tensor([-0.0, 0.0, -1.0, 2.0]),
    "largest": lambda: torch.tensor([3.4028235e38, -3.4028235e38, 1.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_threshold_is_the_sorted_one(
    values: Callable[[], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exact over several tensors, and if they are read in parts."""
    torch.manual_seed(0)
    flat = values().to(dtype)
    if dtype == torch.float64:
        flat = flat * (1 + torch.rand(len(flat), dtype=dtype) * 1e-9)
    flat = flat[flat.isfinite()]
    monkeypatch.setattr(sys.modules[find_threshold.__module__], "CHUNK_ENTRIES", 64)
    descending = flat.abs().sort(descending=True).values
    n = len(flat)
    for density in (1e-9, 0.1, 0.2, 0.5, 0.77, 1 - 1e-9, 1.0):
        parts = flat.split([n // 3, n - n // 3])
        rank = max(1, int(density * n))
        assert find_threshold(lambda p=parts: iter(p), density) == float(descending[rank - 1])


def test_threshold_over_several_dtypes() -> None:
    """A float64 that comes late decides by all of its bits."""
    late = torch.tensor([0.5 + 2**-50, 0.5 + 2**-51], dtype=torch.float64)
    tensors = [torch.tensor([0.5, 0.25]), torch.tensor([1.0], dtype=torch.bfloat16), late]
    found = [find_threshold(lambda: iter(tensors), k / 5) for k in (1, 2, 3, 4, 5)]
    assert found == [1.0, 0.5 + 2**-50, 0.5 + 2**-51, 0.5, 0.25]


def test_agreeing_sums_to_the_merge_without_mean() -> None:
    """The parts that another merge weights anew: their plain sum is the disjoint sum."""
    vectors = [vector(t) for t in random_tensors()]
    parts = keep_agreeing(trim(vectors, 0.3))
    merged = dense(ties(vectors, torch.ones(3), density=0.3, normalize=False))
    for name, total in dense(combine(parts, torch.ones(3))).items():
        torch.testing.assert_close(total, merged[name])
    assert [list(part) for part in parts] == [list(v) for v in vectors]
    with pytest.raises(ValueError, match="one shape"):
        keep_agreeing([row(1, 2), row(1)])[0]["w"]


def counted(vectors: list[TaskVector], reads: list[str]) -> list[TaskVector]:
    def load(v: TaskVector, name: str) -> Delta:
        reads.append(name)
        return v[name]

    return [
        TaskVector("base", {n: (lambda v=v, n=n: load(v, n)) for n in v}, v.seed) for v in vectors
    ]


def test_ties_finds_its_thresholds_once() -> None:
    """Two passes over float32 for the thresholds, then two per tensor: the election and the mean."""
    reads: list[str] = []
    given = counted([vector(t) for t in random_tensors(dtype=torch.float32)], reads)
    merged = ties(given, torch.ones(3))
    for _ in merged.items():
        pass
    assert len(reads) == (2 + 2) * (3 + 3 + 2)
    reads.clear()
    assert merged["b.weight"].shape == SHAPES["b.weight"]
    assert reads == ["b.weight"] * 4


def test_ties_holds_the_tensors_of_one_expert_at_a_time() -> None:
    """Peak memory does not grow with the number of experts."""
    alive: set[int] = set()
    most = 0

    def load(seed: int) -> Delta:
        nonlocal most
        d = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        alive.add(id(d))
        weakref.finalize(d, alive.discard, id(d))
        most = max(most, len(alive))
        return Dense(d)

    given = [TaskVector("base", {"w": lambda e=e: load(e)}) for e in range(8)]
    ties(given, torch.ones(8))["w"]
    assert most == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_dtype_is_kept(method: str, dtype: torch.dtype) -> None:
    vectors = [vector(t, str(e)) for e, t in enumerate(random_tensors(dtype=dtype))]
    found = dense(merges[method].call(vectors, torch.tensor([1.0, 0.5, -2.0])))
    assert {d.dtype for d in found.values()} == {dtype}


def literal_dare(taus: Sequence[dict[str, Tensor]], kept: Sequence[dict[str, Tensor]],
                 weights: Sequence[float], density: float, how: str) -> dict[str, Tensor]:  # fmt: skip
    """The sum of `w m tau / (1 - p)`, with the masks given."""
    found = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    for tau, masks, w in zip(taus, kept, weights, strict=True):
        for name in tau:
            thin = tau[name] * masks[name]
            if how == "inverse_density":
                thin = thin / (1 - (1 - density))
            if how == "l1":
                thin = thin * tau[name].abs().sum() / thin.abs().sum()
            found[name] += w * thin
    return found


@pytest.mark.parametrize("how", ["inverse_density", "l1", "none"])
@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
def test_dare_is_the_paper(how: Any, density: float) -> None:
    taus, weights = random_tensors(), (1.0, -0.5, 2.0)
    vectors = [vector(t, f"expert-{e}") for e, t in enumerate(taus)]
    alone = [dare([v], torch.ones(1), density=density, rescale="none", scale=1.0) for v in vectors]
    masks = [{n: d != 0 for n, d in dense(thin).items()} for thin in alone]
    options: dict[str, Any] = {"density": density, "rescale": how, "scale": 0.3}
    merged = dense(dare(vectors, torch.tensor(weights), **options))
    for name, expected in literal_dare(taus, masks, weights, density, how).items():
        torch.testing.assert_close(merged[name], 0.3 * expected, atol=1e-12, rtol=1e-6)


def thin(v: TaskVector, **options: Any) -> Tensor:
    return dare([v], torch.ones(1), **({"scale": 1.0} | options))["w"].dense()


def test_dare_keeps_the_share_and_the_mean() -> None:
    ones = vector({"w": torch.ones(400, 500)}, "one")
    for density in (0.1, 0.5, 0.9):
        share = float((thin(ones, density=density) != 0).double().mean())
        # Five standard deviations of a mean of 200,000 draws.
        assert abs(share - density) < 5 * (density * (1 - density) / 200_000) ** 0.5
        values = thin(ones, density=density).unique()
        torch.testing.assert_close(values, torch.tensor([0, 1 / density]))
    skewed = vector({"w": torch.randn(300, 300).exp()}, "two")
    norm = thin(skewed, density=0.2, rescale="l1").abs().sum()
    torch.testing.assert_close(norm, skewed["w"].dense().abs().sum())
    assert thin(vector({"w": torch.ones(3)}, "x"), density=1e-4, rescale="l1").tolist() == [0] * 3


def test_masks_differ_by_expert_tensor_and_seed_alone() -> None:
    ones = torch.ones(64, 64)
    first = thin(vector({"w": ones}, "one"))
    assert torch.equal(first, thin(vector({"v": ones, "w": ones}, "one")))
    others = [
        thin(vector({"w": ones}, "two")),
        thin(vector({"w": ones}, "one"), seed=1),
        dare([vector({"v": ones}, "one")], torch.ones(1), scale=1.0)["v"].dense(),
    ]
    masks = [(d != 0).double().flatten() for d in (first, *others)]
    correlations = torch.corrcoef(torch.stack(masks)) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.1
    twice = dare([vector({"w": ones}, "one")] * 2, torch.tensor([1.0, -1.0]))["w"].dense()
    assert int(twice.count_nonzero()) == 0
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    thin(vector({"w": ones}, "one"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_merge_of_merges_has_masks_of_its_own() -> None:
    """The seed of a merge follows from its members', in any order, and differs from theirs."""
    a, b, c = (vector({"w": torch.ones(64, 64)}, name) for name in "abc")
    two = torch.ones(2)
    for merge in (combine, ties, dare):
        assert merge([a, b], two).seed == merge([b, a], two).seed
        seeds = {merge(pair, two).seed for pair in ([a, b], [a, c], [b, c])} | {a.seed, b.seed, ""}
        assert len(seeds) == 6
    nested = [combine([a, b], two), combine([a, c], two)]
    assert not torch.equal(thin(nested[0]), thin(nested[1]))


def test_dare_of_density_one_stays_low_rank() -> None:
    low = TaskVector("base", {"w": lambda: LowRank(torch.ones(2, 5), torch.ones(4, 2))})
    assert isinstance(dare([low], torch.ones(1), density=1.0)["w"], LowRank)
    assert isinstance(dare([low], torch.ones(1))["w"], Dense)


def experts_of(folders: list[Path]) -> Iterator[dict[str, Tensor]]:
    """The task vectors of LoRA folders, alpha twice the rank."""
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        yield {
            n.removeprefix("base_model.model.").replace("lora_A.", ""): (
                2 * tensors[n.replace("lora_A", "lora_B")] @ tensors[n]
            )
            for n in tensors
            if "lora_A" in n
        }


@pytest.mark.parametrize("merge", [{"method": "ties", "density": 0.3}, {"method": "dare"}])
def test_recipes_compose(
    merge: dict[str, Any], base_folder: Path, base_model: Any, expert_folder: Make
) -> None:
    """On its own and as an expert of another merge, whose masks follow from the digests."""
    folders = [expert_folder(1, size=0.1), expert_folder(2, size=0.1, targets=LINEARS[:3])]
    common: dict[str, Any] = {"base": str(base_folder)}
    experts = [{"expert": str(f), "weight": w} for f, w in zip(folders, (1, 0.5), strict=True)]
    one = hub.compose({**common, "experts": experts, "merge": merge})
    digests = [member.digest for member in one.plan.members]
    taus = [vector(t, d) for t, d in zip(experts_of(folders), digests, strict=True)]
    expected = merges[merge["method"]].call(
        taus, torch.tensor([1, 0.5]), **{k: v for k, v in merge.items() if k != "method"}
    )
    for name, before in base_model.state_dict().items():
        change = expected[name].dense() if name in expected else 0
        found = one.model.get_parameter(name)
        torch.testing.assert_close(found, before + change, atol=1e-5, rtol=1e-5)
    nested = {"merge": merge, "experts": experts}
    whole = {"method": "task_arithmetic", "scale": 1}
    deep = hub.compose({**common, "experts": [nested], "merge": whole})
    torch.testing.assert_close(logits(deep.model), logits(one.model))
    for outer in ({"method": "dare"}, {"method": "ties"}):
        again = [
            hub.compose({**common, "experts": order, "merge": outer}).model
            for order in ([nested, str(folders[0])], [str(folders[0]), nested])
        ]
        torch.testing.assert_close(logits(again[0]), logits(again[1]))


def test_route_over_a_nested_merge_needs_its_rank(base_folder: Path, expert_folder: Make) -> None:
    """A trimmed change is dense; of full rank it is the merge, whatever the router's one choice."""
    folders = [str(expert_folder(e, size=0.1)) for e in (1, 2)]
    common: dict[str, Any] = {"base": str(base_folder)}
    nested: dict[str, Any] = {"merge": {"method": "ties"}, "experts": folders}
    merged = hub.compose({**common, **nested}).model
    route = {"method": "uniform"}
    routed = hub.compose({**common, "experts": [nested | {"rank": 48}], "route": route}).model
    torch.testing.assert_close(logits(routed), logits(merged), atol=1e-3, rtol=1e-3)
    hub.compose({**common, "experts": [nested | {"rank": 2}, folders[0]], "route": route})
    with pytest.raises(HubError, match="is dense, and a route needs low-rank experts") as found:
        hub.resolve(hub.Recipe.of({**common, "experts": [nested], "route": route}))
    assert "give its merge a rank" in (found.value.hint or "")


def test_every_option_of_a_line_is_described() -> None:
    options = merges["ties"].options
    assert all(option.description.endswith(".") for option in options.values())
    assert options["scale"].description == "The factor of the merged task vector."
