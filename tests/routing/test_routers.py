"""Routers that choose for whole examples, or are made of examples: end to end on tiny models."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import logits, make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.errors import UsageError
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from experthub.hub.states.run_state import run_folder
from experthub.hub.states.states import load_state, store_state
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task
from torch import Tensor

ROWS = [[5, 77, 130, 9, 200, 33, 41], [9, 33, 12, 50, 77, 1, 2]]


def made_task(name: str, words: list[str]) -> str:
    """A task whose inputs are of a few words."""
    card = Card(name=name, source="made-up", template="{input}")
    examples = []
    for number in range(60):
        text = " ".join(words[(number * 7 + i * 3) % len(words)] for i in range(4)) + f" {number}"
        choices = ["yes", "no"]
        example = Example(
            id=example_id(text, choices), input=text, choices=choices, answer=number % 2
        )
        examples.append(example)
    return write_task("made", card, examples)


@pytest.fixture
def pool(base_folder: Path, expert_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Three experts of the tiny model, each of a task of its own, and a tiny encoder."""
    tiny_bert(tmp_path / "encoder")
    tasks = [
        made_task("animals", ["cat", "dog", "cow", "hen"]),
        made_task("colours", ["RED", "BLUE", "GREEN", "PINK"]),
        made_task("numbers", ["111", "222", "333", "444"]),
    ]
    for seed, task in enumerate(tasks):
        folder = expert_folder(seed)
        name = f"expert-{seed}"
        added = run_hub("add", folder, "--name", name, "--base", base_folder, "--task", task)
        assert added.code == 0, added.err
    recipe = {"base": str(base_folder), "experts": ["expert-0", "expert-1", "expert-2"]}
    return {"recipe": recipe, "tasks": tasks, "encoder": str(tmp_path / "encoder")}


def routed(pool: dict[str, Any], method: str, **options: Any) -> hub.Composition:
    more = {"data": options.pop("data")} if "data" in options else {}
    if method in ("retrieval", "lora_retriever"):
        options.setdefault("embedder", pool["encoder"])
    route = {"method": method, **options}
    return hub.compose({**pool["recipe"], "route": route, **more})


def stored(plan: Plan) -> tuple[Any, Any]:
    """The description and the state of a plan's router, by way of the store."""
    session = Session()
    return load_state(plan, store_state(plan, session), session)


def of_expert(pool: dict[str, Any], number: int, rows: list[list[int]] = ROWS) -> Tensor:
    """The logits of one expert alone."""
    recipe = {**pool["recipe"], "experts": [f"expert-{number}"], "route": {"method": "uniform"}}
    return logits(hub.compose(recipe).model, rows)


def test_a_batch_of_several_tasks(pool: dict[str, Any]) -> None:
    composition = routed(pool, "task")
    with composition.tasks([pool["tasks"][2], "expert-0"]):
        found = logits(composition.model, ROWS)
        torch.testing.assert_close(found[0], of_expert(pool, 2)[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], of_expert(pool, 0)[1], atol=1e-4, rtol=1e-4)
    with composition.tasks("expert-1"):
        found = logits(composition.model, ROWS)
        torch.testing.assert_close(found, of_expert(pool, 1), atol=1e-4, rtol=1e-4)
    three = composition.tasks(["a", "b", "c"])
    with pytest.raises(UsageError, match="3 tasks were named for a batch of 2 rows"), three:
        logits(composition.model, ROWS)
    mean = logits(routed(pool, "uniform").model, ROWS)
    torch.testing.assert_close(logits(composition.model, ROWS), mean, atol=1e-4, rtol=1e-4)
    base = composition.detach()
    plain = transformers.AutoModelForCausalLM.from_pretrained(pool["recipe"]["base"])
    assert torch.equal(logits(base, ROWS), logits(plain, ROWS))
    refusing = routed(pool, "task", unknown="refuse")
    with pytest.raises(UsageError, match="no task was named for this call"):
        logits(refusing.model, ROWS)
    unknown = refusing.tasks("nonsense")
    with pytest.raises(UsageError, match="no expert was trained on the task 'nonsense'"), unknown:
        logits(refusing.model, ROWS)


def ids_of(texts: list[str], folder: str, side: str = "right") -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    return tokenizer(texts, padding=True, return_tensors="pt")


def test_experts_of_high_rank_are_chosen_for_whole_rows(
    base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    """The experts have so many rows that the kernels of a router by token are timed."""
    experts = [str(expert_folder(seed, rank=16, size=0.1)) for seed in (1, 2)]
    recipe = {"base": str(base_folder), "experts": experts}
    composition = hub.compose({**recipe, "route": {"method": "task"}})
    for expert, planned in zip(experts, composition.plan.experts, strict=True):
        alone = hub.compose({**recipe, "experts": [expert], "merge": {"method": "linear"}}).model
        with composition.tasks(planned.label):
            found = logits(composition.model, ROWS)
        torch.testing.assert_close(found, logits(alone, ROWS), atol=1e-4, rtol=1e-4)


def test_retrieval_takes_the_expert_of_the_nearest_example(pool: dict[str, Any]) -> None:
    composition = routed(pool, "retrieval", examples=20)
    texts = ["RED BLUE PINK RED 1", "cat dog"]
    for side in ("right", "left"):
        batch = ids_of(texts, pool["recipe"]["base"], side)
        with torch.no_grad():
            found = composition.model(**batch).logits
            for row, expert in enumerate([1, 0]):
                recipe = {**pool["recipe"], "experts": [f"expert-{expert}"]}
                alone = hub.compose({**recipe, "route": {"method": "uniform"}}).model
                expected = alone(**batch).logits
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(
                    found[row][real], expected[row][real], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("method", ["task", "retrieval", "lora_retriever", "smear", "xlora"])
def test_rows_keep_their_experts_in_the_cache(pool: dict[str, Any], method: str) -> None:
    """Continued rows, selected, repeated and reordered, go on as each did."""
    options: dict[str, Any] = {}
    if method == "xlora":
        options = {"steps": 2, "data": {"tasks": pool["tasks"][:1], "labels": True, "limit": 8}}
    composition = routed(pool, method, **options)
    model = composition.model
    prompts, more = torch.tensor(ROWS), torch.tensor([[4, 8], [15, 16]])
    with torch.no_grad(), composition.tasks(["expert-1", "expert-2"]):
        read = model(input_ids=prompts, use_cache=True)
        alone = []
        for row in (0, 1):
            with composition.tasks(f"expert-{row + 1}"):
                begun = model(input_ids=prompts[row : row + 1], use_cache=True)
                cache = begun.past_key_values
                alone.append(model(input_ids=more[row : row + 1], past_key_values=cache).logits)
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_select_indices(torch.tensor([1, 0, 0]))
        found = model(input_ids=more[[1, 0, 0]], past_key_values=cache).logits
        torch.testing.assert_close(found[0], alone[1][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[2], alone[0][0], atol=1e-4, rtol=1e-4)
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_repeat_interleave(2)
        found = model(input_ids=more[[0, 0, 1, 1]], past_key_values=cache).logits
        torch.testing.assert_close(found[1], alone[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[3], alone[1][0], atol=1e-4, rtol=1e-4)
        read.past_key_values.reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids=more[[1, 0]], past_key_values=read.past_key_values).logits
        torch.testing.assert_close(found[0], alone[1][0], atol=1e-4, rtol=1e-4)


def test_beams_and_single_steps_write_the_same(pool: dict[str, Any]) -> None:
    composition = routed(pool, "retrieval", examples=10)
    batch = ids_of(["RED BLUE PINK"], pool["recipe"]["base"])
    greedy = composition.model.generate(**batch, max_new_tokens=4, do_sample=False)
    recipe = {**pool["recipe"], "experts": ["expert-1"], "route": {"method": "uniform"}}
    alone = hub.compose(recipe).model
    assert torch.equal(greedy, alone.generate(**batch, max_new_tokens=4, do_sample=False))
    beams = composition.model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)
    expected = alone.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(beams, expected)


def test_smear_is_the_literal_merge_of_each_row(pool: dict[str, Any]) -> None:
    """The first routed module against the paper's section 3, with padding that has no say."""
    composition = routed(pool, "smear")
    module = composition.model.model.layers[0].self_attn.q_proj
    ids = torch.tensor([[5, 77, 130, 9], [9, 33, 12, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    with torch.no_grad():
        composition.model(input_ids=ids, attention_mask=mask)
    handle.remove()
    x, y = seen[0]
    assert bool(y.isfinite().all())
    recipe = {**pool["recipe"], "route": {"method": "phatgoose", "top_k": 1}}
    other = hub.compose(recipe).model.model.layers[0].self_attn.q_proj
    group, n = other.group, other.position
    gates = group.packed.probes[3 * n : 3 * n + 3]  # of q, standardised and scaled
    for row, length in ((0, 4), (1, 3)):
        tokens = torch.nn.functional.layer_norm(x[row, :length], (32,))
        w = (tokens @ gates.T).mean(0).softmax(-1)
        stack = group.packed.a.own[12 * n : 12 * n + 12].view(3, 4, 32)
        a = torch.einsum("e,eri->ri", w, stack)
        b = torch.einsum("e,ero->ro", w, group.packed.b[n].own.view(3, 4, 32))
        expected = x[row] @ module.weight.T + x[row] @ a.T @ b
        torch.testing.assert_close(y[row], expected, atol=1e-3, rtol=1e-3)


def test_average_activation_is_the_mean_of_real_inputs(pool: dict[str, Any]) -> None:
    route = {"method": "average_activation", "examples": 5}
    recipe = hub.Recipe.of({**pool["recipe"], "route": route})
    plan = resolve(recipe)
    _, state = stored(plan)
    found = state.tensors["1.model.layers.0.self_attn.q_proj"]
    task = read_task(pool["tasks"][1])
    one = {**pool["recipe"], "experts": ["expert-1"], "route": {"method": "uniform"}}
    model = hub.compose(one).model
    tokenizer = transformers.AutoTokenizer.from_pretrained(pool["recipe"]["base"])
    rows: list[Tensor] = []
    module = model.model.layers[0].self_attn.q_proj
    handle = module.register_forward_hook(lambda m, i, o: rows.append(i[0][0]))
    for example in task.split("train", 5):
        prompt = tokenizer(task.format_prompt(example))["input_ids"]
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt]))
            for choice in task.list_choices(example):
                whole = tokenizer(task.format_prompt(example) + " " + choice)["input_ids"]
                before = len(rows)
                model(input_ids=torch.tensor([whole[:-1]]))
                rows[before] = rows[before][len(prompt) :]
    handle.remove()
    torch.testing.assert_close(found, torch.cat(rows).mean(0), atol=1e-4, rtol=1e-3)
    assert torch.isfinite(logits(hub.compose(recipe).model, ROWS)).all()


def test_best_individual_is_the_expert_with_the_best_score(pool: dict[str, Any]) -> None:
    data = {"tasks": pool["tasks"][:2], "labels": True, "split": "train"}
    composition = routed(pool, "best_individual", data=data)
    recipes = {
        f"expert-{e}": hub.Recipe.of(
            {**pool["recipe"], "experts": [f"expert-{e}"], "route": {"method": "uniform"}}
        )
        for e in range(3)
    }
    result = hub.evaluate(recipes, pool["tasks"][:2], split="train")
    averages = {name: result["average"][name]["accuracy"] for name in recipes}
    best = max(averages, key=lambda name: averages[name])
    expected = of_expert(pool, int(best[-1]))
    torch.testing.assert_close(logits(composition.model, ROWS), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="needs right answers"):
        routed(pool, "best_individual", data={"tasks": pool["tasks"][:1]})


def test_xlora_weighs_by_the_hidden_states_of_the_base(pool: dict[str, Any]) -> None:
    """Every token's weights are those of a classifier over what the base alone would see."""
    data = {"tasks": pool["tasks"][:2], "labels": True, "limit": 10}
    composition = routed(pool, "xlora", data=data, steps=12, lr=0.05, depth=2, size=16)
    record, state = stored(composition.plan)
    assert len(record.history) == 12 and record.history[-1] < record.history[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(pool["recipe"]["base"])
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        x = base.model(input_ids=ids).last_hidden_state
        t = state.tensors
        x = (x @ t["classifier.0.weight"].T + t["classifier.0.bias"]).relu()
        x = x @ t["classifier.1.weight"].T + t["classifier.1.bias"]
        expected = x.view(2, 7, 2, 3).softmax(-1)
    seen: dict[int, Tensor] = {}

    def watch(layer: int) -> Any:
        def before(module: Any, inputs: Any) -> None:
            if not module.group.context.off:
                seen[layer] = module.compute_weights(inputs[0])

        return before

    for layer in (0, 1):
        module = composition.model.model.layers[layer].mlp.down_proj
        module.register_forward_pre_hook(watch(layer))
    whole = logits(composition.model, ROWS)
    for layer in (0, 1):
        torch.testing.assert_close(seen[layer], expected[:, :, layer], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        cache, parts = None, []
        for start, end in ((0, 3), (3, 4), (4, 7)):
            read = composition.model(
                input_ids=ids[:, start:end], past_key_values=cache, use_cache=True
            )
            cache = read.past_key_values
            parts.append(read.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_what_a_router_was_made_of_is_kept_named_and_checked(
    pool: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {
        **pool["recipe"],
        "route": {"method": "retrieval", "examples": 10, "embedder": pool["encoder"]},
    }
    path = Path("route.yaml")
    path.write_text(json.dumps(recipe))
    ran = run_hub("router", path, "--name", "index", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["method"] == "retrieval" and len(ran.json["experts"]) == 3
    assert ran.json["tensors"]["index"] == [30, 32]
    first = logits(hub.compose(path).model, ROWS)
    named = {**recipe, "router": "index"}
    assert torch.equal(logits(hub.compose(named).model, ROWS), first)
    assert run_hub("lock", path).code == 0
    assert "router:" in Path("route.lock.yaml").read_text()
    assert run_hub("compose", path, "--frozen").code == 0
    other = {**named, "experts": ["expert-1", "expert-0", "expert-2"]}
    with pytest.raises(UsageError, match="in another order or for more experts"):
        hub.compose(other)
    changed = {**named, "experts": ["expert-0", "expert-1"]}
    with pytest.raises(UsageError, match="in another order or for more experts"):
        hub.compose(changed)
    with pytest.raises(UsageError, match="was made with examples: 10, and the recipe sets 11"):
        hub.compose({**named, "route": {**recipe["route"], "examples": 11}})
    with pytest.raises(UsageError, match="index@1 holds a router's state, which is not an expert"):
        hub.compose({**recipe, "experts": ["index"]})
    with pytest.raises(UsageError, match="router: does not belong to a merge"):
        hub.compose({**pool["recipe"], "merge": {"method": "linear"}, "router": "index"})
    with pytest.raises(UsageError, match="looks at the experts' own tasks; remove data"):
        hub.compose({**recipe, "data": {"tasks": pool["tasks"]}})


def test_an_expert_without_a_task_is_refused(
    pool: dict[str, Any], expert_folder: Callable[..., Path]
) -> None:
    recipe = {**pool["recipe"], "experts": ["expert-0", str(expert_folder(7))]}
    with pytest.raises(UsageError, match="does not say which task it was trained on"):
        hub.compose({**recipe, "route": {"method": "average_activation"}})


def test_an_encoder_is_routed_by_example(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    tasks = [made_task("animals", ["cat", "dog"]), made_task("colours", ["RED", "BLUE"])]
    for seed, task in enumerate(tasks):
        expert = make_expert(
            tmp_path / f"e{seed}", folder, seed, targets=("query", "value"),
            task_type="FEATURE_EXTRACTION",
        )  # fmt: skip
        run_hub("add", expert, "--name", f"e-{seed}", "--base", folder, "--task", task)
    recipe = {"base": str(folder), "experts": ["e-0", "e-1"]}
    routes = {
        "task": {"method": "task"},
        "retrieval": {"method": "retrieval", "embedder": str(folder), "examples": 10},
        "smear": {"method": "smear"},
        "average_activation": {"method": "average_activation", "examples": 10},
        "xlora": {"method": "xlora", "steps": 2},
    }
    made = {}
    for name, route in routes.items():
        data = {"data": {"tasks": tasks, "labels": True}} if name == "xlora" else {}
        made[name] = hub.Recipe.of({**recipe, "route": route, **data})
    result = hub.evaluate(made, tasks, split="test")
    alone = {
        f"alone-{e}": hub.Recipe.of(
            {**recipe, "experts": [f"e-{e}"], "route": {"method": "uniform"}}
        )
        for e in (0, 1)
    }
    single = hub.evaluate(alone, tasks, split="test")
    for number, row in enumerate(result["tasks"]):
        by_task = row["methods"]["task"]["logprob"]
        expected = single["tasks"][number]["methods"][f"alone-{number}"]["logprob"]
        assert by_task == pytest.approx(expected, abs=1e-4)


def test_a_router_by_example_refuses_models_that_it_cannot_see_into(
    pool: dict[str, Any],
) -> None:
    composition = routed(pool, "task")
    with pytest.raises(UsageError, match="without inputs"):
        composition.model.model(input_ids=None, inputs_embeds=None)


def test_a_router_that_reads_texts_refuses_embeddings(pool: dict[str, Any]) -> None:
    """A router that does not read texts takes them."""
    given = torch.tensor(ROWS)
    for method in ("task", "retrieval"):
        model = routed(pool, method).model
        embedded = model.get_input_embeddings()(given)
        if method == "task":
            expected = model(input_ids=given).logits
            torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
        else:
            with pytest.raises(UsageError, match="the model got embeddings"):
                model(inputs_embeds=embedded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_routers_by_example_and_suggestions_run_on_a_gpu(pool: dict[str, Any]) -> None:
    """States are loaded from the store, and made on the GPU."""
    labelled = {"data": {"tasks": pool["tasks"][:2], "labels": True, "limit": 8}}
    more: dict[str, dict[str, Any]] = {
        "task": {},
        "retrieval": {},
        "lora_retriever": {},
        "best_individual": labelled,
        "xlora": {**labelled, "steps": 2, "size": 16},
    }
    ids = torch.tensor(ROWS)
    for method, options in more.items():
        composition = routed(pool, method, **options)
        expected = logits(composition.model, ROWS)
        model = hub.compose(composition.plan, device="cuda").model
        with torch.no_grad():
            found = model(input_ids=ids.cuda()).logits.cpu()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        shutil.rmtree(run_folder(composition.plan), ignore_errors=True)
        hub.compose(composition.plan, device="cuda")
    names, session = pool["recipe"]["experts"], Session(device="cuda")
    by: Any
    for by in ("gates", "prototypes"):
        scores = hub.suggest(pool["tasks"][0], names, by=by).scores[by]
        found_by = hub.suggest(pool["tasks"][0], names, by=by, session=session).scores[by]
        assert found_by == pytest.approx(scores, abs=1e-3)
