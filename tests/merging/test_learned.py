"""Learned merges against literal versions of their papers, on a model of three weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from experthub.merge import (
    AttachedExperts,
    Coefficients,
    Delta,
    Dense,
    Fit,
    LowRank,
    MethodError,
    MethodFailure,
    TaskVector,
    assign_blocks,
    compose_vector,
    learn_coefficients,
    merges,
)
from experthub.merge._coefficients import draw_groups, make_generator
from experthub.merge._fitting import choose_rows, make_start_coefficients
from experthub.merge._objectives import (
    choose_trusted,
    cross_entropy,
    entropy,
    fixmatch,
    marginal_entropy,
)
from learning import (
    SHAPES,
    Tiny,
    TinyData,
    literal,
    make_data,
    make_materials,
    prepare_merge,
    run_merge,
)
from test_conformance import vectors
from torch import Tensor, nn

WIDE = torch.float64


def wide(form: str = "low-rank", count: int = 3) -> list[TaskVector]:
    """The task vectors of the conformance suite in double precision."""

    def widened(delta: Any) -> Any:
        if form == "dense":
            return Dense(delta.dense().to(WIDE))
        return LowRank(delta.a.to(WIDE), delta.b.to(WIDE), delta.scale)

    return [
        TaskVector(v.base, {n: (lambda n=n, v=v: widened(v[n])) for n in v}, v.seed)
        for v in vectors(count=count)
    ]


def fit(**options: Any) -> Fit:
    settings: dict[str, Any] = {
        "objective": "entropy",
        "granularity": "layer",
        "start": 0.3,
        "steps": 6,
        "lr": 0.05,
        "batch_size": 8,
    }
    return Fit(**{**settings, **options})


def logits_by(weights: dict[str, Tensor], data: TinyData, rows: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.func.functional_call(data.model, weights, (x[r],))
        for x, r in zip(data.x_tND, rows, strict=True)
    ]


def place_of(start: Coefficients) -> dict[str, int]:
    labels = {label: b for b, label in enumerate(start.blocks)}
    return {name: labels[b] for name, b in assign_blocks(SHAPES, start.granularity).items()}


class TestGradients:
    """The gradient of a coefficient is that of autograd through the sum written out."""

    @pytest.mark.parametrize("form", ["low-rank", "dense", "mixed"])
    @pytest.mark.parametrize("granularity", ["task", "layer", "block", r"^[ab]"])
    def test_equals_autograd(self, form: str, granularity: str) -> None:
        given = [*wide("dense", 3)[:1], *wide()[1:]] if form == "mixed" else wide(form)
        data = TinyData(Tiny(WIDE))
        start = make_start_coefficients(given, fit(granularity=granularity))
        values = torch.rand(start.values.shape, dtype=WIDE, generator=torch.Generator())
        rows = [torch.arange(8), torch.arange(6)]
        with AttachedExperts(data.model, given, start) as attached:
            attached.set(values)
            sum(entropy(found) for found in data.logits(rows)).backward()
            found = attached.gradient()
        leaf = values.clone().requires_grad_()
        weights = literal(data.model, given, leaf, place_of(start))
        sum(entropy(found) for found in logits_by(weights, data, rows)).backward()
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)
        assert float(found.abs().max()) > 0.1

    @pytest.mark.parametrize("form", ["low-rank", "dense"])
    def test_of_a_partition(self, form: str) -> None:
        given, data = wide(form), TinyData(Tiny(WIDE))
        start = make_start_coefficients(given, fit(granularity="partition", groups=3))
        values = torch.rand(start.values.shape, dtype=WIDE, generator=torch.Generator())
        assert values.shape == (3, 3, 3)
        with AttachedExperts(data.model, given, start) as attached:
            attached.set(values)
            entropy(data.logits([torch.arange(8), torch.arange(0)])[0]).backward()
            found = attached.gradient()
        leaf, weights = values.clone().requires_grad_(), {}
        for b, name in enumerate(start.blocks):
            weight = data.model.get_parameter(name).detach()
            group = draw_groups(name, weight.numel(), 3, 0).long().view(weight.shape)
            for e, vector in enumerate(given):
                if name in vector:
                    weight = weight + leaf[e, b][group] * vector[name].dense()
            weights[name] = weight
        rows = [torch.arange(8), torch.arange(0)]
        entropy(logits_by(weights, data, rows)[0]).backward()
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)
        merged = compose_vector(given, replace(start, values=values))
        for name, weight in weights.items():
            change = weight.detach() - data.model.get_parameter(name)
            torch.testing.assert_close(merged[name].dense(), change)

    def test_of_summed_factors(self) -> None:
        given, data = wide(), TinyData(Tiny(WIDE))
        start = make_start_coefficients(given, fit(granularity="task", combine="parameters"))
        values = torch.rand(3, 1, dtype=WIDE, generator=torch.Generator())
        rows = [torch.arange(8), torch.arange(6)]
        with AttachedExperts(data.model, given, start) as attached:
            attached.set(values)
            sum(entropy(found) for found in data.logits(rows)).backward()
            found = attached.gradient()
        leaf, weights = values.clone().requires_grad_(), {}
        for name, weight in data.model.named_parameters():
            here = [(v[name], c) for v, c in zip(given, leaf[:, 0], strict=True) if name in v]
            b = sum(c * d.scale * d.b for d, c in here)  # type: ignore[union-attr]
            weights[name] = weight.detach() + b @ sum(c * d.a for d, c in here)  # type: ignore[union-attr]
        sum(entropy(found) for found in logits_by(weights, data, rows)).backward()
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)
        merged = compose_vector(given, replace(start, values=values))
        for name, weight in weights.items():
            change = weight.detach() - data.model.get_parameter(name)
            torch.testing.assert_close(merged[name].dense(), change)

    @pytest.mark.parametrize("padding", [None, 2])
    def test_of_an_embedding_of_which_some_rows_are_read(self, padding: int | None) -> None:
        class Looked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.e = nn.Embedding(9, 4, padding_idx=padding, dtype=WIDE)
                self.f = nn.Linear(4, 3, dtype=WIDE).requires_grad_(False)

            def forward(self, ids: Tensor) -> Tensor:
                return self.f(torch.tanh(self.e(ids)).mean(1))

        model, alone = Looked(), Looked()
        reads: list[int] = []
        alone.load_state_dict(model.state_dict())
        random = torch.Generator().manual_seed(1)
        changes = [torch.randn(9, 4, generator=random, dtype=WIDE) for _ in range(2)]

        def change(expert: int) -> Delta:
            reads.append(expert)
            return Dense(changes[expert])

        given = [TaskVector("base", {"e.weight": partial(change, e)}) for e in range(2)]
        start = make_start_coefficients(given, fit())
        with AttachedExperts(model, given, start) as attached:
            batches = [([[1, 2, 2], [5, 1, 1]], [0, 1]), ([[1, 7, 2]], [0, 1]), ([[5, 7, 7]], [])]
            for ids, new in batches:
                values = torch.rand(2, 1, dtype=WIDE, generator=random)
                attached.set(values)
                reads.clear()
                entropy(model(torch.tensor(ids))).backward()
                assert reads == new
                leaf = values.clone().requires_grad_()
                weight = literal(alone, given, leaf, {"e.weight": 0})["e.weight"]
                logits = torch.func.functional_call(alone, {"e.weight": weight}, torch.tensor(ids))
                entropy(logits).backward()
                torch.testing.assert_close(attached.gradient(), leaf.grad, rtol=1e-10, atol=1e-12)
        assert torch.equal(model.e(torch.tensor([1])), model.e.weight[None, 1])

    def test_several_backward_passes_add_up(self) -> None:
        given, data = wide("dense"), TinyData(Tiny(WIDE))
        start = make_start_coefficients(given, fit())
        none = torch.arange(0)
        with AttachedExperts(data.model, given, start) as attached:
            attached.set(start.values)
            entropy(data.logits([torch.arange(8), none])[0]).backward()
            entropy(data.logits([none, torch.arange(6)])[1]).backward()
            apart = attached.gradient()
            attached.set(start.values)
            both = data.logits([torch.arange(8), torch.arange(6)])
            sum(entropy(found) for found in both).backward()
            torch.testing.assert_close(apart, attached.gradient())

    def test_the_base_is_back_afterwards(self) -> None:
        data = TinyData()
        before = dict(data.model.named_parameters())
        x = data.logits([torch.arange(3), torch.arange(3)])[0].detach()
        for form in ("dense", "low-rank"):
            learn_coefficients(make_materials(vectors(form), data), fit(steps=2))
            assert dict(data.model.named_parameters()) == before
            assert torch.equal(data.logits([torch.arange(3), torch.arange(3)])[0], x)


class TestLearning:
    @pytest.mark.parametrize("constraint", ["none", "clamp", "project"])
    def test_trajectory_of_entropy_is_adam_s(self, constraint: Any) -> None:
        """AdaMerging written out with autograd and torch's Adam."""
        given, data = wide("dense"), TinyData(Tiny(WIDE))
        settings = fit(lr=0.2, steps=12, constraint=constraint)
        start = make_start_coefficients(given, settings)
        leaf = start.values.clone().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=0.2)
        for step in range(12):
            used = leaf.clamp(0, 1) if constraint == "clamp" else leaf
            weights = literal(data.model, given, used, place_of(start))
            rows = [choose_rows(n, 8, step, 0, t) for t, n in enumerate(data.sizes)]
            loss = sum(entropy(found) for found in logits_by(weights, data, rows))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if constraint == "project":
                with torch.no_grad():
                    leaf.clamp_(0, 1)
        wanted = leaf.detach().clamp(0, 1) if constraint == "clamp" else leaf.detach()
        found = learn_coefficients(make_materials(given, data), settings)
        torch.testing.assert_close(found.values, wanted, rtol=1e-9, atol=1e-9)
        assert float(found.values.min()) < 0 or constraint != "none"

    def test_atlas_in_twenty_lines(self) -> None:
        """https://arxiv.org/abs/2407.02880, section 3: coefficients from zero, AdamW, cosine."""
        given, data = wide("dense"), make_data(WIDE)
        steps, rate = 10, 0.1
        labels = data.labels or []
        leaf = torch.zeros(3, 3, dtype=WIDE, requires_grad=True)
        optimiser = torch.optim.AdamW([leaf], lr=rate, weight_decay=0.1)
        place = {name: b for b, name in enumerate(sorted(SHAPES))}
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            weights = literal(data.model, given, leaf, place)
            rows = [choose_rows(n, 128, step, 0, t) for t, n in enumerate(data.sizes)]
            found = logits_by(weights, data, rows)
            pairs = zip(found, rows, labels, strict=True)
            optimiser.zero_grad()
            sum(nn.functional.cross_entropy(x, y[r]) for x, r, y in pairs).backward()
            optimiser.step()
        state = prepare_merge(merges["atlas"], given, torch.ones(3), data, steps=steps, patience=0)
        torch.testing.assert_close(state.values, leaf.detach(), rtol=1e-9, atol=1e-9)

    def test_goes_on_after_an_interruption_to_the_same_bits(self) -> None:
        kept: dict[str, Any] = {}
        settings = fit(objective="cross_entropy", steps=50, l2=0.1, cosine=True, patience=20)
        whole = learn_coefficients(make_materials(vectors(), make_data()), settings)

        class Stop(Exception):
            pass

        def stop(_: str, done: int, __: int) -> None:
            if done == 33:
                raise Stop

        first = make_materials(vectors(), make_data(), save=kept.update, report=stop)
        with pytest.raises(Stop):
            learn_coefficients(first, settings)
        assert len(kept["history"]) == 20
        seen: list[int] = []
        second = make_materials(
            vectors(),
            make_data(),
            load=lambda: kept,
            report=lambda _, done, __: seen.append(done),
        )
        again = learn_coefficients(second, settings)
        assert seen[0] == 21
        assert torch.equal(again.values, whole.values) and again.history == whole.history

    @pytest.mark.parametrize("objective", ["entropy", "marginal_entropy", "fixmatch"])
    def test_unlabelled_means_unlabelled(self, objective: Any) -> None:
        """Permuted and missing labels give the same bits."""
        found = []
        for change in (lambda y: y, lambda y: (y + 1) % 4, None):
            data = make_data()
            if change is None:
                data.labelled = False
            else:
                data.answers = [change(y) for y in data.answers]
            materials = make_materials(vectors(), data)
            found.append(learn_coefficients(materials, fit(objective=objective)).values)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

    def test_what_reached_a_bound_can_leave_it(self) -> None:
        """A clamp where coefficients are used holds them outside; moving them back does not."""
        given, data = wide("dense"), TinyData(Tiny(WIDE))
        outside = Coefficients(torch.full((3, 3), -0.2, dtype=WIDE), tuple(sorted(SHAPES)), "layer")
        for constraint, moves in (("clamp", False), ("project", True)):
            settings = fit(start=-0.2, constraint=constraint, steps=40)
            found = learn_coefficients(make_materials(given, data), settings)
            inside = found.values[:, :2]  # nothing depends on the third
            assert bool((inside > 0).any()) == moves
        assert outside.values.shape == found.values.shape

    def test_the_best_on_held_out_examples_is_kept(self) -> None:
        data = make_data()
        held_out = data.held_out
        losses: list[float] = []
        plain = held_out.logits

        def watched(rows: Any, view: int = 0) -> list[Tensor]:
            found = plain(rows, view)
            pairs = zip(found, held_out.answers, strict=True)
            losses.append(sum(float(cross_entropy(x, y)) for x, y in pairs) / 2)
            return found

        held_out.logits = watched
        settings = fit(objective="cross_entropy", lr=0.5, steps=200, batch_size=32, patience=3)
        found = learn_coefficients(make_materials(vectors(), data), settings)
        assert len(found.history) < 200  # it stopped
        best = min(range(len(losses)), key=losses.__getitem__)
        assert best == len(losses) - 1 - 3
        longer = learn_coefficients(
            make_materials(vectors(), make_data()), replace(settings, steps=200, patience=0)
        )
        assert len(longer.history) == 200
        assert not torch.equal(longer.values, found.values)

    def test_negation_forgets_one_task_and_keeps_the_other(self) -> None:
        given = make_data()
        labels = given.labels or []

        def losses(vector: TaskVector | None) -> list[float]:
            data = TinyData(labelled=True)
            with torch.no_grad():
                for name in vector or ():
                    data.model.get_parameter(name).add_(vector[name].dense())  # type: ignore[index]
                found = data.logits([torch.arange(n) for n in data.sizes])
            return [float(cross_entropy(x, y)) for x, y in zip(found, labels, strict=True)]

        run = partial(run_merge, merges["atlas"], vectors(), torch.ones(3), given)
        options: dict[str, Any] = {"setting": "negation", "forget": "second", "lr": 0.05}
        merged = run(**options, patience=0)
        before, after = losses(None), losses(merged)
        assert after[1] - before[1] > max(1, after[0] - before[0])
        held_out = given.held_out
        held_out.answers[0] = held_out.logits([torch.arange(n) for n in held_out.sizes])[0].argmax(
            -1
        )
        strict = run(**options, keep=1.0)
        with torch.no_grad():
            for name in strict:
                given.model.get_parameter(name).add_(strict[name].dense())
            kept = held_out.logits([torch.arange(n) for n in held_out.sizes])[0].argmax(-1)
        assert torch.equal(kept, held_out.answers[0])
        with pytest.raises(MethodError, match="the data has no task 'third'") as caught:
            run(setting="negation", forget="third")
        assert caught.value.hint == "use one of first, second"
        alone = TinyData(sizes=(8,), labelled=True, tasks=("first",))
        with pytest.raises(MethodError, match="data: names only one"):
            run_merge(merges["atlas"], vectors(), torch.ones(3), alone, setting="negation")

    def test_stored_coefficients_need_no_data(self) -> None:
        for name, options in (("adamerging", {"steps": 3}), ("atlas", {"steps": 3})):
            given = vectors(), torch.ones(3)
            stored = prepare_merge(merges[name], *given, make_data(), **options)
            merged = run_merge(merges[name], *given, make_data(), **options)
            again = merges[name].call(*given, stored, **options)
            assert all(torch.equal(merged[n].dense(), again[n].dense()) for n in merged)

    def test_half_precision_vectors_learn_nearly_the_same(self) -> None:
        whole = learn_coefficients(make_materials(vectors("dense"), TinyData()), fit())
        halves = learn_coefficients(make_materials(vectors("dense"), TinyData()), fit(halves=True))
        difference = (whole.values - halves.values).abs().max()
        assert 0 < difference < 0.02

    def test_weights_multiply_the_vectors(self) -> None:
        weights = torch.tensor([1.0, 2.0, 1.0])
        doubled = vectors()
        doubled[1] = TaskVector(
            "base", {n: (lambda n=n: vectors()[1][n].scaled(2.0)) for n in doubled[1]}
        )
        one = run_merge(merges["adamerging"], vectors(), weights, make_data(), steps=5)
        two = run_merge(merges["adamerging"], doubled, torch.ones(3), make_data(), steps=5)
        for name in one:
            torch.testing.assert_close(one[name].dense(), two[name].dense())


class TestBadInput:
    def test_data_and_labels_are_asked_for(self) -> None:
        with pytest.raises(ValueError, match="expected data to learn from"):
            learn_coefficients(make_materials(vectors()), fit())
        with pytest.raises(ValueError, match="expected labels for the objective cross_entropy"):
            learn_coefficients(
                make_materials(vectors(), TinyData()), fit(objective="cross_entropy")
            )
        with pytest.raises(ValueError, match="inputs of at least one task"):
            learn_coefficients(make_materials(vectors(), TinyData(sizes=(3, 0))), fit())

    def test_a_task_of_one_class(self) -> None:
        data = TinyData()
        data.logits = lambda rows, view=0: [x[:, :1] for x in TinyData(data.model).logits(rows)]  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="two choices or more"):
            learn_coefficients(make_materials(vectors(), data), fit())

    def test_a_loss_that_is_not_finite(self) -> None:
        data = TinyData()
        data.x_tND[1][4] = float("nan")
        with pytest.raises(MethodFailure, match="the loss is nan at step 1") as caught:
            learn_coefficients(make_materials(vectors(), data), fit(batch_size=64))
        assert caught.value.hint == "set a lower lr"

    def test_experts_of_zeros_and_one_expert(self) -> None:
        found = learn_coefficients(make_materials(vectors(zero=True), TinyData()), fit())
        assert torch.equal(found.values, torch.full((3, 3), 0.3, dtype=WIDE))
        one = learn_coefficients(make_materials(vectors(count=1), TinyData()), fit())
        assert one.values.shape == (1, 2)  # its third parameter is not changed

    def test_coefficients_of_something_else(self) -> None:
        values = torch.zeros(2, 3, dtype=WIDE)
        with pytest.raises(ValueError, match="coefficients of 3 experts, found 2"):
            compose_vector(vectors(), Coefficients(values, tuple(SHAPES), "layer"))
        with pytest.raises(ValueError, match=r"found none for c\.weight"):
            compose_vector(
                vectors()[:2], Coefficients(values[:, :2], ("a.weight", "b.weight"), "layer")
            )
        with pytest.raises(ValueError, match=r"experts, 3 blocks\], found \[2, 2\]"):
            Coefficients(values[:, :2], tuple(SHAPES), "layer")
        with pytest.raises(ValueError, match="regular expression, found '\\('"):
            assign_blocks(SHAPES, "(")


class TestObjectives:
    def test_entropy_of_masked_choices(self) -> None:
        logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
        assert float(entropy(logits).detach()) == pytest.approx(math.log(2))
        entropy(logits).backward()
        assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]

    def test_marginal_entropy_is_of_the_mean_prediction(self) -> None:
        views = torch.randn(3, 5, 4, generator=torch.Generator())
        mean = views.softmax(-1).mean(0)
        wanted = -(mean * mean.log()).sum(-1).mean()
        torch.testing.assert_close(marginal_entropy(views), wanted)

    def test_fixmatch_trusts_what_it_is_told_and_what_is_sure(self) -> None:
        weak = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 9.0]])
        strong = torch.randn(3, 2, generator=torch.Generator())
        pseudo, known = torch.tensor([1, 0, 0]), torch.tensor([True, False, False])
        log = strong.log_softmax(-1)
        # The first has its pseudo-label; the second is unsure; the third takes its own.
        wanted = -log[0, 1] - log[2, 1] / 2
        torch.testing.assert_close(fixmatch(weak, strong, known, pseudo, 0.99), wanted)

    def test_trusted_are_the_surest_of_each_class(self) -> None:
        """The count of the paper, not all of them as the authors' code has it."""
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(100, 4, generator=random)
        chosen, label = choose_trusted(logits)
        sure = logits.softmax(-1).max(-1)
        for c in range(4):
            of_class = (sure.indices == c).nonzero()[:, 0]
            best = of_class[sure.values[of_class].argsort(descending=True)[:2]]  # 100 / 4 / 10
            assert set(best.tolist()) == set((chosen & (label == c)).nonzero()[:, 0].tolist())


class TestGranularity:
    NAMES = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.11.self_attn.q_proj.weight",
        "model.norm.weight",
    ]

    def test_names(self) -> None:
        assert set(assign_blocks(self.NAMES, "task").values()) == {"model"}
        assert list(assign_blocks(self.NAMES, "layer").values()) == self.NAMES
        assert list(assign_blocks(self.NAMES, "block").values()) == [
            "model.embed_tokens",
            "model.layers.0",
            "model.layers.0",
            "model.layers.11",
            "model.norm",
        ]

    def test_blocks_are_in_the_order_of_their_numbers(self) -> None:
        names = [f"layers.{n}.mlp.weight" for n in (10, 2, 1)]
        vector = TaskVector("base", {n: (lambda: Dense(torch.ones(1, 1))) for n in names})
        assert make_start_coefficients([vector], fit()).blocks == tuple(names[::-1])

    def test_an_expression(self) -> None:
        found = list(assign_blocks(self.NAMES, r"(self_attn|mlp)").values())
        assert found == ["rest", "self_attn", "mlp", "self_attn", "rest"]
        halves = list(assign_blocks(self.NAMES, r"layers\.\d\d").values())
        assert halves == ["rest", "rest", "rest", "layers.11", "rest"]


def expert_model(vector: TaskVector) -> Tiny:
    model = Tiny(WIDE)
    with torch.no_grad():
        for name in vector:
            model.get_parameter(name).add_(vector[name].dense())
    return model


def inputs_of(model: Tiny, x: Tensor) -> dict[str, Tensor]:
    return {"a.weight": x, "b.weight": torch.tanh(model.a(x))}


class TestClosedForms:
    """RegMean, RegMean++ and Fisher written out."""

    def given(self) -> tuple[list[TaskVector], TinyData, Tensor]:
        return wide()[:2], make_data(WIDE), torch.tensor([1.0, 0.5], dtype=WIDE)

    def solved(
        self, weights: Tensor, grams: list[Tensor], changes: list[Tensor], alpha: float
    ) -> Tensor:
        scaled = [g * alpha + (1 - alpha) * g.diagonal().diag() for g in grams]
        left = sum(w * g for w, g in zip(weights, scaled, strict=True))
        right = sum(w * g @ d.T for w, g, d in zip(weights, scaled, changes, strict=True))
        return torch.linalg.solve(left, right).T

    def test_regmean(self) -> None:
        given, data, weights = self.given()
        options = {"off_diagonal": 0.9, "batch_size": 5}
        merged = run_merge(merges["regmean"], given, weights, data, **options)
        rows = [inputs_of(expert_model(v), x) for v, x in zip(given, data.x_tND, strict=True)]
        for name in ("a.weight", "b.weight"):
            grams = [r[name].T @ r[name] / len(r[name]) for r in rows]
            wanted = self.solved(weights, grams, [v[name].dense() for v in given], 0.9)
            torch.testing.assert_close(merged[name].dense(), wanted, rtol=1e-6, atol=1e-7)
        mean = (given[0]["c.weight"].dense() + 0.5 * given[1]["c.weight"].dense()) / 1.5
        torch.testing.assert_close(merged["c.weight"].dense(), mean)

    def test_regmean_plusplus(self) -> None:
        given, data, weights = self.given()
        options = {"off_diagonal": 0.9, "batch_size": 5}
        merged = run_merge(merges["regmean_plusplus"], given, weights, data, **options)
        so_far = Tiny(WIDE)
        for name in ("a.weight", "b.weight"):
            rows = [inputs_of(so_far, x)[name] for x in data.x_tND]
            grams = [x.T @ x / len(x) for x in rows]
            wanted = self.solved(weights, grams, [v[name].dense() for v in given], 0.9)
            torch.testing.assert_close(merged[name].dense(), wanted, rtol=1e-6, atol=1e-7)
            with torch.no_grad():
                so_far.get_parameter(name).add_(wanted)

    def test_a_tied_weight_has_a_change_for_each_of_its_names(self) -> None:
        class Tied(Tiny):
            def __init__(self) -> None:
                super().__init__(WIDE)
                self.d = nn.Linear(5, 6, bias=False)
                self.d.weight = self.a.weight

        given = [replace(v, load={**v.load, "d.weight": v.load["a.weight"]}) for v in wide()[:2]]
        for name in ("adamerging", "regmean", "regmean_plusplus", "fisher"):
            options = {"steps": 2} if name == "adamerging" else {}
            data = TinyData(Tied())
            merged = run_merge(merges[name], given, torch.ones(2), data, **options)
            assert set(merged) == {*SHAPES, "d.weight"} and merged["d.weight"].shape == (6, 5)

    def test_regmean_of_equal_experts_is_the_expert(self) -> None:
        given, data, weights = self.given()
        for name in ("regmean", "regmean_plusplus", "fisher"):
            merged = run_merge(merges[name], [given[0], given[0]], weights, data)
            for n in merged:
                torch.testing.assert_close(
                    merged[n].dense(), given[0][n].dense(), rtol=1e-4, atol=1e-5
                )

    def test_fisher(self) -> None:
        given, data, weights = self.given()
        merged = run_merge(merges["fisher"], given, weights, data, floor=1e-6)
        information = []
        for task, (vector, x) in enumerate(zip(given, data.x_tND, strict=True)):
            model, draw = (
                expert_model(vector).requires_grad_(True),
                make_generator("fisher", 0, task),
            )
            sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            for row in x:
                log = model(row[None]).log_softmax(-1)
                answer = torch.multinomial(log.detach().exp(), 1, generator=draw)
                model.zero_grad()
                log[0, answer.item()].backward()
                for name, p in model.named_parameters():
                    sums[name] += 0 if p.grad is None else p.grad**2
            information.append({n: (s / len(x)).clamp(min=1e-6) for n, s in sums.items()})
        for name in merged:
            f, g = (w * i[name] for w, i in zip(weights, information, strict=True))
            wanted = (f * given[0][name].dense() + g * given[1][name].dense()) / (f + g)
            torch.testing.assert_close(merged[name].dense(), wanted, rtol=1e-6, atol=1e-7)

    def test_weights_that_sum_to_zero(self) -> None:
        given, data, _ = self.given()
        for name in ("regmean", "regmean_plusplus", "fisher"):
            for weights in (torch.zeros(2, dtype=WIDE), torch.tensor([1.0, -1.0], dtype=WIDE)):
                with pytest.raises(MethodError, match="a sum other than 0") as caught:
                    run_merge(merges[name], given, weights, data)
                assert caught.value.hint.startswith("change the weights")

    def test_one_task_for_each_expert(self) -> None:
        for name in ("regmean", "regmean_plusplus", "fisher"):
            with pytest.raises(ValueError, match="one task for each of the 3 experts"):
                run_merge(merges[name], vectors(), torch.ones(3), make_data())


class TestLoraHub:
    def test_finds_the_expert_that_the_labels_come_from(self) -> None:
        data, model = make_data(), Tiny()
        with torch.no_grad():
            for name in vectors()[1]:
                model.get_parameter(name).add_(vectors()[1][name].dense())
            data.answers = [model(x).argmax(-1) for x in data.x_tND]
        for optimizer, steps in (("adam", 60), ("cma_es", 200)):
            options = {"optimizer": optimizer, "steps": steps}
            state = prepare_merge(merges["lorahub"], vectors(), torch.ones(3), data, **options)
            found = state.values[:, 0].abs().tolist()  # -w and w are one product
            assert max(found) == found[1] and max(found) <= 1.5

    def test_the_loss_counts_the_weights(self) -> None:
        seen = []

        def minimize(loss: Any, start: Any, bound: float, evaluations: int, seed: int) -> Any:
            seen.append((loss([0.0, 0.0, 0.0]), bound, evaluations))
            return [0.0, 0.0, 1.0]

        source = make_materials(vectors(), make_data(), minimize=minimize)
        merged = run_merge(merges["lorahub"], vectors(), torch.ones(3), source, l1=0.05)
        data = TinyData(labelled=True)
        found = data.logits([torch.arange(n) for n in data.sizes])
        plain = (
            sum(float(cross_entropy(x, y)) for x, y in zip(found, data.answers, strict=True)) / 2
        )
        assert seen == [(pytest.approx(plain), 1.5, 40)]
        assert merged["a.weight"].dense().allclose(vectors()[2]["a.weight"].dense())

    def test_an_interrupted_search_goes_on_to_the_same_point(self) -> None:
        kept: dict[str, Any] = {}

        class Stop(Exception):
            pass

        def stop(_: str, done: int, __: int) -> None:
            if done == 25:
                raise Stop

        prepare = partial(prepare_merge, merges["lorahub"], vectors(), torch.ones(3))
        whole = prepare(make_data())
        source = make_materials(vectors(), make_data())
        with pytest.raises(Stop):
            prepare(replace(source, save=kept.update, report=stop))
        assert len(kept["history"]) == 25
        seen: list[int] = []
        source = make_materials(vectors(), make_data())
        found = prepare(
            replace(source, load=lambda: kept, report=lambda _, done, __: seen.append(done))
        )
        assert seen[0] == 26 and torch.equal(found.values, whole.values)

    def test_unequal_ranks(self) -> None:
        given = vectors()
        other = LowRank(torch.ones(1, 5), torch.ones(6, 1))
        given[0] = TaskVector("base", {**given[0].load, "a.weight": lambda: other})
        with pytest.raises(ValueError, match="one rank to sum their factors, found ranks 1, 2"):
            run_merge(merges["lorahub"], given, torch.ones(3), make_data())
        with pytest.raises(MethodError, match=r"a\.weight: expected low-rank changes") as caught:
            run_merge(merges["lorahub"], vectors("dense"), torch.ones(3), make_data())
        assert caught.value.hint == "set combine: outputs"

    @pytest.mark.parametrize("name", ["embed.weight", "a.bias"])
    def test_factors_of_other_parameters_cannot_be_summed(self, name: str) -> None:
        """The error comes while experts are attached, and the model is the base again."""
        model = nn.ModuleDict({"a": nn.Linear(5, 6), "embed": nn.Embedding(7, 5)})
        before = dict(model.named_parameters())
        shape = model.get_parameter(name).shape
        low = LowRank(torch.ones(1, 5), torch.ones(6, 1))
        change = {"a.weight": lambda: low, name: lambda: Dense(torch.ones(shape))}
        given = [TaskVector("base", change)]
        start = make_start_coefficients(given, fit(granularity="task", combine="parameters"))
        with pytest.raises(MethodError, match=f"{name}: expected low-rank changes"):
            AttachedExperts(model, given, start)
        assert dict(model.named_parameters()) == before
        assert not model["a"]._forward_hooks and not model["embed"]._forward_hooks

    def test_only_weights_that_are_replaced_can_be_fixed(self) -> None:
        data = TinyData()
        start = make_start_coefficients(vectors(), fit())
        with (
            AttachedExperts(data.model, vectors(), start) as attached,
            pytest.raises(TypeError, match="attached with `take`"),
        ):
            attached.fix("a.weight", torch.ones(6, 5))
