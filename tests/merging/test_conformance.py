"""Every merge and every router of the catalogues passes the same checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from experthub.merge import Dense, LowRank, PluginError, Strategy, TaskVector, merges
from experthub.routing import (
    KERNELS,
    Context,
    ExpertStack,
    ModelRouter,
    RoutedLinear,
    Skills,
    Weights,
    attach_experts,
    compute_reference,
    group_modules,
    pack_experts,
    routers,
)
from learning import SHAPES, make_data, run_merge
from router_materials import LAYERS, bind, drawn, pool_of, prepare, some_rows, with_state
from torch import Tensor, nn

COMBINES = ("outputs", "parameters")


def methods_of(name: str) -> list[Any]:
    """The methods of the catalogues that the suite of this name is for."""
    known = [*merges.values(), *routers.values()]
    return [pytest.param(s, id=s.name) for s in known if suite_name(s) == name]


def suite_name(strategy: Strategy[Any]) -> str:
    """The class of tests that a method must pass; every method has one."""
    if strategy.kind == "merge":
        return "TestMergesOfPrompts" if strategy.traits.prompts else "TestMerges"
    if "skills" in strategy.needs:
        return "TestRoutersOfSkills"
    by_module = strategy.traits.routing.depth == "module"
    return "TestRouters" if by_module else "TestRoutersOfTheModel"


def cast(delta: LowRank | Dense, dtype: torch.dtype) -> LowRank | Dense:
    if isinstance(delta, LowRank):
        return LowRank(delta.a.to(dtype), delta.b.to(dtype), delta.scale)
    return Dense(delta.d.to(dtype))


def vectors(form: str = "low-rank", zero: bool = False, count: int = 3) -> list[TaskVector]:
    """Random task vectors; the last lacks a parameter."""
    made = []
    for e in range(count):
        random = torch.Generator().manual_seed(e)
        load: dict[str, Callable[[], Any]] = {}
        for name, (o, i) in SHAPES.items():
            if e == count - 1 and name == "c.weight":
                continue
            a, b = torch.randn(2, i, generator=random), torch.randn(o, 2, generator=random)
            delta = LowRank(a, b * (0 if zero else 1), 0.5 + e)
            value = delta if form == "low-rank" else Dense(delta.dense())
            load[name] = lambda value=value: value
        made.append(TaskVector("base", load, seed=f"expert-{e}"))
    return made


def call(
    strategy: Strategy[Any],
    given: list[TaskVector],
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
) -> TaskVector:
    """A merge with its defaults; one that learns does so for few steps, on random inputs."""
    torch.manual_seed(0)
    few: dict[str, object] = {"steps": 3} if "steps" in strategy.options else {}
    if "combine" in strategy.options:
        few["combine"] = "outputs"  # the other way is not defined for dense experts
    return run_merge(strategy, given, weights, make_data(dtype, count=len(given)), **few)


def merged(strategy: Strategy[Any], given: list[TaskVector], weights: Tensor) -> dict[str, Tensor]:
    result = call(strategy, given, weights)
    return {name: result[name].dense() for name in result}


WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


@pytest.mark.parametrize("strategy", methods_of("TestMerges"))
class TestMerges:
    def test_keeps_keys_shapes_and_dtype(self, strategy: Strategy[Any]) -> None:
        for dtype in (torch.float32, torch.float64):
            given = [
                TaskVector("base", {n: (lambda d=v[n], t=dtype: cast(d, t)) for n in v})
                for v in vectors()
            ]
            result = call(strategy, given, WEIGHTS, dtype)
            assert {n: result[n].shape for n in result} == SHAPES
            assert {result[n].dtype for n in result} == {dtype}

    def test_leaves_inputs_untouched(self, strategy: Strategy[Any]) -> None:
        given = vectors()
        before = [{n: v[n].dense().clone() for n in v} for v in given]
        merged(strategy, given, WEIGHTS)
        for vector, old in zip(given, before, strict=True):
            assert all(torch.equal(vector[n].dense(), old[n]) for n in vector)

    def test_order_of_experts_does_not_matter(self, strategy: Strategy[Any]) -> None:
        if strategy.traits.order_dependent:
            return
        given, order = vectors(), [2, 0, 1]
        first = merged(strategy, given, WEIGHTS)
        again = merged(strategy, [given[e] for e in order], WEIGHTS[order])
        for name in first:
            torch.testing.assert_close(first[name], again[name])

    def test_zero_vectors_give_zero(self, strategy: Strategy[Any]) -> None:
        result = merged(strategy, vectors(zero=True), WEIGHTS)
        assert all(bool((d == 0).all()) for d in result.values())

    def test_low_rank_and_dense_agree(self, strategy: Strategy[Any]) -> None:
        low, dense = (
            merged(strategy, vectors(), WEIGHTS),
            merged(strategy, vectors("dense"), WEIGHTS),
        )
        for name in low:
            torch.testing.assert_close(low[name], dense[name])

    def test_says_whether_low_rank_experts_stay_so(self, strategy: Strategy[Any]) -> None:
        result = call(strategy, vectors(), WEIGHTS)
        low = all(isinstance(result[name], LowRank) for name in result)
        if strategy.prepare is None:  # a learned one may leave it to its options
            assert low != strategy.traits.dense

    def test_is_lazy_and_the_same_bits_again(self, strategy: Strategy[Any]) -> None:
        asked: list[str] = []

        def watched(vector: TaskVector) -> TaskVector:
            def load(name: str) -> Any:
                asked.append(name)
                return vector[name]

            return TaskVector("base", {n: (lambda n=n: load(n)) for n in vector}, vector.seed)

        result = call(strategy, [watched(v) for v in vectors()], WEIGHTS)
        if "data" in strategy.needs:  # what it learns from is all of the experts, at once
            asked.clear()
        assert not asked
        one = result["b.weight"].dense()
        assert set(asked) == (set(SHAPES) if strategy.traits.whole_model else {"b.weight"})
        assert torch.equal(one, merged(strategy, vectors(), WEIGHTS)["b.weight"])

    def test_refuses_vectors_of_two_bases(self, strategy: Strategy[Any]) -> None:
        one, two, three = vectors()
        other = TaskVector("other", two.load)
        with pytest.raises(ValueError, match="one base"):
            call(strategy, [one, other, three], WEIGHTS)


def stack(
    count: int = 3,
    ranks: tuple[int, ...] = (2, 2, 2),
    zero: bool = False,
    missing: int | None = None,
) -> ExpertStack:
    random = torch.Generator().manual_seed(0)
    deltas, gates = {}, {}
    for e in range(count):
        a = torch.randn(ranks[e % len(ranks)], 8, generator=random)
        b = torch.randn(5, ranks[e % len(ranks)], generator=random)
        if e != missing:
            deltas[e] = LowRank(a, b * (0 if zero else 1), 0.5 + e)
            gates[e] = torch.randn(8, generator=random)
    return ExpertStack.of(deltas, count, gates)


def make_router(strategy: Strategy[Any], experts: ExpertStack) -> Any:
    """The router of a module, with its state and its defaults."""
    return strategy.call(adapted(strategy, experts), **bind(strategy))


def adapted(strategy: Strategy[Any], experts: ExpertStack) -> ExpertStack:
    """The experts as the router wants them, with its state."""
    given = replace(experts, **with_state(strategy, experts))
    adapt = strategy.traits.adapt
    return given if adapt is None else adapt(given, bind(strategy))


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 5).requires_grad_(False).to(dtype)


def inputs() -> Tensor:
    return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strategy", methods_of("TestRouters"))
@pytest.mark.parametrize("combine", COMBINES)
class TestRouters:
    def routed(self, strategy: Strategy[Any], combine: Any, experts: ExpertStack) -> RoutedLinear:
        router = make_router(strategy, experts)
        return RoutedLinear.from_stack(linear(), experts, router, combine)

    def test_weights_are_finite(self, strategy: Strategy[Any], combine: str) -> None:
        module = self.routed(strategy, combine, stack())
        for x in (inputs(), torch.zeros(1, 2, 8), inputs() * 1e4):
            w = module.compute_weights(x)
            assert w.shape == (*x.shape[:-1], 3) and bool(torch.isfinite(w).all())

    def test_experts_that_change_nothing_give_the_base(
        self, strategy: Strategy[Any], combine: str
    ) -> None:
        module = self.routed(strategy, combine, stack(zero=True))
        assert torch.equal(module(inputs()), linear()(inputs()))

    def test_a_row_depends_on_itself_only(self, strategy: Strategy[Any], combine: str) -> None:
        module, x = self.routed(strategy, combine, stack()), inputs()
        whole = module(x)
        for b in range(3):
            if strategy.traits.routing.input == "example":
                torch.testing.assert_close(module(x[b : b + 1])[0], whole[b], atol=1e-5, rtol=1e-5)
                continue
            for t in range(4):
                alone = module(x[b : b + 1, t : t + 1])[0, 0]
                torch.testing.assert_close(alone, whole[b, t], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("missing", [None, 1])
    @pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3)])
    @pytest.mark.parametrize("kernel", [None, *KERNELS])
    def test_kernels_agree_with_the_reference(
        self, strategy: Strategy[Any], combine: Any, missing: int | None, ranks: Any, kernel: Any
    ) -> None:
        if combine == "parameters" and ranks != (2, 2, 2):
            pytest.skip("parameters of unequal ranks do not mix")
        experts = stack(5, missing=missing, ranks=ranks)
        router = make_router(strategy, experts)
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
        expected = compute_reference(x, linear()(x), experts, router, combine)
        fused = RoutedLinear.from_stack(linear(), experts, router, combine, kernel=kernel)
        torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(fused(x[:3]), expected[:3], atol=1e-4, rtol=1e-5)
        if kernel is not None:
            return
        half = RoutedLinear.from_stack(linear(torch.bfloat16), experts, router, combine)
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, atol=0.5, rtol=0.1)

    @pytest.mark.parametrize("kernel", [None, *KERNELS])
    def test_modules_of_one_input_agree_with_each_alone(
        self, strategy: Strategy[Any], combine: Any, kernel: Any
    ) -> None:
        other_ranks = (2,) if combine == "parameters" else (3, 1)
        stacks = [stack(4), stack(4, zero=True), stack(4, ranks=other_ranks)]
        found = [make_router(strategy, experts) for experts in stacks]
        bases = [linear() for _ in stacks]
        if group_modules(stacks, found, combine) != [[0, 1, 2]]:
            assert not strategy.call.__module__.startswith("experthub.")
            pytest.skip("these routers differ in more than probes, so each module stands alone")
        grouped = attach_experts(
            bases, pack_experts(stacks, found, bases[0].weight), combine, kernel
        )
        pairs = zip(bases, stacks, found, strict=True)
        alone = [RoutedLinear.from_stack(b, s, r, combine, kernel=kernel) for b, s, r in pairs]
        x, other = inputs(), inputs() * 2
        for order in (
            [0, 1, 2],
            [2, 0, 1],
            [0, 0, 1],
            [1, 2, 2],
        ):  # one may be called twice, or not
            for given in (x, other):
                for i in order:
                    torch.testing.assert_close(
                        grouped[i](given), alone[i](given), atol=1e-5, rtol=1e-5
                    )
        for i in (0, 1, 2):  # each with an input of its own
            given = inputs() * (i + 1)
            torch.testing.assert_close(grouped[i](given), alone[i](given), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                grouped[i].compute_weights(given), alone[i].compute_weights(given)
            )

    @pytest.mark.parametrize("tokens", [1, 40])
    def test_is_captured_as_one_graph(
        self, strategy: Strategy[Any], combine: Any, tokens: int
    ) -> None:
        stacks = [stack(4), stack(4)]
        found = [make_router(strategy, experts) for experts in stacks]
        module = nn.ModuleList(
            attach_experts(
                [linear(), linear()], pack_experts(stacks, found, linear().weight), combine
            )
        )
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1))

        def run(given: Tensor) -> list[Tensor]:
            return [one(given) for one in module]

        torch._dynamo.reset()
        whole = torch.compile(run, fullgraph=True, backend="eager")
        for given in (x, x * 2):
            torch.testing.assert_close(whole(given), run(given), atol=1e-5, rtol=1e-5)

    def test_no_tokens_and_inputs_that_lie_apart(
        self, strategy: Strategy[Any], combine: Any
    ) -> None:
        module = self.routed(strategy, combine, stack())
        assert module(torch.empty(0, 8)).shape == (0, 5)
        x = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
        torch.testing.assert_close(module(x), module(x.contiguous()))

    def test_one_expert_twice_and_gates_of_any_size(
        self, strategy: Strategy[Any], combine: Any
    ) -> None:
        one = stack(1)
        gate = torch.randn(8, generator=torch.Generator().manual_seed(2))
        for size in (0.0, 1e-8, 1.0, 1e8):
            twice = ExpertStack.of(
                {0: one.deltas[0], 1: one.deltas[0]}, 2, {0: gate * size, 1: gate * size}
            )
            found = self.routed(strategy, combine, twice)(inputs())
            assert bool(torch.isfinite(found).all())
            if combine == "outputs":
                alone = ExpertStack.of({0: one.deltas[0]}, 1, {0: gate})
                torch.testing.assert_close(found, self.routed(strategy, combine, alone)(inputs()))

    def test_parameters_keep_their_names(self, strategy: Strategy[Any], combine: str) -> None:
        module = self.routed(strategy, combine, stack())
        assert set(module.state_dict()) == {"weight", "bias"}
        assert module.base.weight is module.weight


@pytest.mark.parametrize("strategy", methods_of("TestRoutersOfTheModel"))
class TestRoutersOfTheModel:
    def select(self, strategy: Strategy[Any], rows: Any) -> Weights:
        select = strategy.call(pool_of(prepare(strategy)), **bind(strategy))
        found: Weights = select(rows)
        return found

    def routed(self, strategy: Strategy[Any], experts: ExpertStack, x: Tensor) -> Tensor:
        """Run a module on inputs `[B, S, I]`, whose experts were chosen for the rows."""
        rows = some_rows()
        context = Context(rows=len(x), tokens=x.shape[1])
        context.select(self.select(strategy, rows[slice(0, len(x))]))
        layer = LAYERS - 1 if strategy.traits.routing.input == "token" else None
        router = ModelRouter(context, experts.experts, experts.n_experts, layer)
        found: Tensor = RoutedLinear.from_stack(linear(), experts, router, context=context)(x)
        return found

    def test_weights_are_finite_and_of_every_expert(self, strategy: Strategy[Any]) -> None:
        weights = self.select(strategy, some_rows())
        dense = weights.dense(3)
        assert dense.dtype == torch.float32 and dense.shape[-1] == 3
        assert bool(dense.isfinite().all()) and bool((dense >= 0).all())
        by_input = {"nothing": (3,), "task": (4, 3), "example": (4, 3)}
        routing = strategy.traits.routing
        assert dense.shape == by_input.get(routing.input, dense.shape)
        if routing.input == "token":
            assert dense.shape in ((4, 3, LAYERS, 3), (4, 3, 1, 3))

    def test_a_row_depends_on_itself_only(self, strategy: Strategy[Any]) -> None:
        rows, whole = some_rows(), self.select(strategy, some_rows()).dense(3)
        for row in range(4):
            alone = self.select(strategy, rows[slice(row, row + 1)]).dense(3)
            expected = whole if whole.ndim == 1 else whole[row : row + 1]
            torch.testing.assert_close(alone, expected)

    def test_experts_that_change_nothing_give_the_base(self, strategy: Strategy[Any]) -> None:
        x = drawn("x", 4, 3, 8)
        assert torch.equal(self.routed(strategy, stack(zero=True), x), linear()(x))

    def test_outputs_are_the_weighted_sum(self, strategy: Strategy[Any]) -> None:
        x, experts = drawn("x", 4, 3, 8), stack()
        weights = self.select(strategy, some_rows()).dense(3)
        if weights.ndim == 4:  # of tokens, by layer
            weights = weights[:, :, -1]
        elif weights.ndim == 2:
            weights = weights[:, None]
        changes = torch.stack([x @ delta.dense().T for delta in experts.deltas.values()], -1)
        expected = linear()(x) + (changes * weights[..., None, :]).sum(-1)
        found = self.routed(strategy, experts, x)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)

    def test_the_state_is_the_same_bits_again(self, strategy: Strategy[Any]) -> None:
        first, again = prepare(strategy), prepare(strategy)
        assert list(first) == list(again)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("strategy", methods_of("TestRoutersOfSkills"))
class TestRoutersOfSkills:
    def skills(self, size: float = 1.0) -> Skills:
        logits = {task: drawn(task, 1, 4) for task in ("t0", "t1")}
        return Skills(drawn("a", 4, 2, 8), drawn("b", 4, 6, 2) * size, 0.5, logits)

    def test_a_task_folds_to_its_mixture(self, strategy: Strategy[Any]) -> None:
        skills = self.skills()
        for task in ("t0", "t1", "average"):
            found = strategy.call(skills, **strategy.bind({"task": task}))
            weights = skills.weights(task)[0]
            a, b = (weights @ t.flatten(1) for t in (skills.a_SRI, skills.b_SOR))
            expected = 0.5 * b.view(6, 2) @ a.view(2, 8)
            torch.testing.assert_close(found.dense(), expected)
            assert bool(weights.isfinite().all()) and abs(float(weights.sum()) - 1) < 1e-5

    def test_without_a_task_it_is_the_average(self, strategy: Strategy[Any]) -> None:
        skills = self.skills()
        average = strategy.call(skills, **strategy.bind({"task": "average"}))
        found = strategy.call(skills, **strategy.bind({}))
        assert torch.equal(found.dense(), average.dense())

    def test_skills_that_change_nothing_give_no_change(self, strategy: Strategy[Any]) -> None:
        found = strategy.call(self.skills(0.0), **strategy.bind({"task": "t1"}))
        assert bool((found.dense() == 0).all())


@pytest.mark.parametrize("strategy", methods_of("TestMergesOfPrompts"))
class TestMergesOfPrompts:
    def test_one_prompt_is_itself(self, strategy: Strategy[Any]) -> None:
        for shape in ((3, 8), (2, 2, 3, 4)):
            prompt = drawn("prompt", *shape)
            found = strategy.call([prompt], torch.ones(1), **strategy.bind({}))
            assert torch.equal(found, prompt) and found.dtype == prompt.dtype

    def test_inputs_stay_as_they_are(self, strategy: Strategy[Any]) -> None:
        prompts = [drawn("a", 3, 8), drawn("b", 5, 8)]
        before = [prompt.clone() for prompt in prompts]
        found = strategy.call(prompts, torch.ones(2), **strategy.bind({}))
        assert found.shape[1] == 8 and bool(found.isfinite().all())
        assert all(torch.equal(a, b) for a, b in zip(prompts, before, strict=True))

    def test_weights_and_widths_that_do_not_fit_are_refused(self, strategy: Strategy[Any]) -> None:
        with pytest.raises(ValueError, match="weights of 1"):
            strategy.call([drawn("a", 3, 8)], torch.tensor([0.5]), **strategy.bind({}))
        with pytest.raises(ValueError, match="one width"):
            strategy.call([drawn("a", 3, 8), drawn("b", 3, 6)], torch.ones(2), **strategy.bind({}))


def test_every_method_is_in_a_suite() -> None:
    suites = (
        "TestMerges",
        "TestMergesOfPrompts",
        "TestRouters",
        "TestRoutersOfTheModel",
        "TestRoutersOfSkills",
    )
    found = [param.id for suite in suites for param in methods_of(suite)]
    assert sorted(found) == sorted([*merges, *routers])
    for suite in suites:
        (mark,) = [m for m in globals()[suite].pytestmark if m.args[0] == "strategy"]
        assert [param.id for param in mark.args[1]] == [param.id for param in methods_of(suite)]


def test_a_broken_plug_in_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported once, and the methods of the plug-ins after it stay in the catalogue."""
    broken = EntryPoint("broken", "experthub_has_no_such_module", "group")
    monkeypatch.setattr("experthub.merge._catalogue.entry_points", lambda group: [broken])
    for catalogue in (merges, routers):
        before, messages = list(catalogue), len(caplog.messages)
        monkeypatch.setattr(catalogue, "_plugins_loaded", False)
        monkeypatch.setattr(catalogue, "broken", {})
        for _ in range(2):
            assert list(catalogue) == before
            with pytest.raises(PluginError, match=r"'broken'.*no_such_module"):
                catalogue["broken"]
        assert len(caplog.messages) == messages + 1
