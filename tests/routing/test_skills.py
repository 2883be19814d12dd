"""Inventories of skills: the papers' formulas, peft's Poly, training, adapting and composing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import logits, run_hub, tiny_bert
from experthub import hub
from experthub.hub.bases.base import read
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.store.folder import read_folder
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.training.skills import find_linears
from experthub.routing import BatchTasks, SkilledLinear, Skills
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

S, R, I, O, H, TASKS = 3, 2, 8, 12, 4, 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(heads: int = H, relaxed: bool = False) -> SkilledLinear:
    torch.manual_seed(0)
    base = nn.Linear(I, O).requires_grad_(False)
    logits_THS = nn.Parameter(drawn(TASKS, heads, S, seed=3))
    made = SkilledLinear(
        base, drawn(S, R, I), drawn(S, O, R, seed=1), 0.5, logits_THS, BatchTasks(), relaxed=relaxed
    )
    return made.eval()


def literal(skilled: SkilledLinear, x: Tensor, task: int) -> Tensor:
    """MHR, section 3: each head mixes its slice of the inputs of A, and of the outputs of B."""
    z = torch.sigmoid(skilled.logits[task])
    w = z / z.sum(-1, keepdim=True)
    heads = len(w)
    a, b = torch.zeros(R, I), torch.zeros(O, R)
    for h in range(heads):
        inputs = slice(h * I // heads, (h + 1) * I // heads)
        outputs = slice(h * O // heads, (h + 1) * O // heads)
        for s in range(S):
            a[:, inputs] += w[h, s] * skilled.skill_a[s][:, inputs]
            b[outputs] += w[h, s] * skilled.skill_b[s][outputs]
    added: Tensor = skilled.base(x) + 0.5 * x @ a.T @ b.T
    return added


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rows_of_several_tasks_are_the_papers_formula(heads: int) -> None:
    skilled, x = module(heads), drawn(3, 5, I, seed=7)
    skilled.batch.tasks = torch.tensor([1, 0, 1])
    found = skilled(x)
    for row, task in enumerate([1, 0, 1]):
        torch.testing.assert_close(found[row], literal(skilled, x[row], task))
    skills = Skills(
        skilled.skill_a, skilled.skill_b, 0.5, {"a": skilled.logits[0], "b": skilled.logits[1]}
    )
    for task, name in enumerate("ab"):
        lora = skills.fold(name)
        expected = literal(skilled, x, task) - skilled.base(x)
        torch.testing.assert_close(x @ lora.dense().T, expected)
    mean = skills.fold("average")
    torch.testing.assert_close(mean.a, skilled.skill_a.mean(0))
    torch.testing.assert_close(mean.b, skilled.skill_b.mean(0))
    skilled.batch.tasks = torch.tensor([1, 1, 1])  # one task takes a shorter way
    torch.testing.assert_close(skilled(x)[0], found[0])
    skilled.batch.tasks = torch.tensor([0])
    with pytest.raises(ValueError, match="expected the tasks of 3 rows"):
        skilled(x)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("training", [False, True])
def test_equals_peft(heads: int, training: bool) -> None:
    """peft draws gates for every row, and we for every task: a row for each task is the same draw."""
    skilled = module(heads, relaxed=True).train(training)
    wrapped = nn.ModuleDict({"linear": nn.Linear(I, O)})
    wrapped["linear"].load_state_dict(skilled.base.state_dict())
    config = peft.PolyConfig(
        target_modules=["linear"], r=R, n_tasks=TASKS, n_skills=S, n_splits=heads, poly_type="poly"
    )
    theirs = peft.tuners.poly.PolyModel(wrapped, config, "x").train(training)
    layer = theirs.model["linear"]
    with torch.no_grad():
        a_HSIR = skilled.skill_a.view(S, R, heads, I // heads).permute(2, 0, 3, 1)
        b_HSRO = skilled.skill_b.view(S, heads, O // heads, R).permute(1, 0, 3, 2)
        layer.poly_lora_A["x"].copy_(a_HSIR)
        layer.poly_lora_B["x"].copy_(b_HSRO)
        layer.poly_router["x"].module_logits.copy_(skilled.logits.flatten(1))
    skilled.scale = 1 / R
    skilled.batch.tasks = torch.tensor([0, 1])
    x = drawn(2, 5, I, seed=7)
    torch.manual_seed(5)
    expected = layer(x, task_ids=torch.tensor([0, 1]))
    torch.manual_seed(5)
    torch.testing.assert_close(skilled(x), expected, atol=1e-5, rtol=1e-5)


def test_training_copies_of_the_average_is_training_the_average() -> None:
    """MHR-mu: S skills under fixed weights 1 / S have the average's gradient over S, each."""
    lora = module(heads=1)
    x = drawn(2, 5, I, seed=7)
    many = SkilledLinear(
        lora.base, lora.skill_a.detach().clone(), lora.skill_b.detach().clone(), 0.5,
        nn.Parameter(torch.zeros(1, 1, S), requires_grad=False), BatchTasks(torch.tensor([0, 0])),
    )  # fmt: skip
    one = SkilledLinear(
        lora.base, lora.skill_a.detach().mean(0)[None], lora.skill_b.detach().mean(0)[None], 0.5,
        nn.Parameter(torch.zeros(1, 1, 1), requires_grad=False), BatchTasks(torch.tensor([0, 0])),
    )  # fmt: skip
    torch.testing.assert_close(many(x), one(x))
    many(x).square().sum().backward()
    one(x).square().sum().backward()
    for name in ("skill_a", "skill_b"):
        copies, average = getattr(many, name).grad, getattr(one, name).grad
        assert copies is not None and average is not None
        for copy in copies:
            torch.testing.assert_close(copy, average[0] / S, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [3, 5])
def test_heads_must_divide_the_widths(heads: int) -> None:
    with pytest.raises(ValueError, match="heads that divide 8 inputs and 12 outputs"):
        module(heads)


def words_task(name: str, words: list[str]) -> str:
    """Make a task that asks which of two kinds of words an input has."""
    card = Card(name=name, source="made-up", template="{input}", labels=["yes", "no"])
    examples = []
    for number in range(100):
        text = f"{words[number % 2]} {number}"
        choices = ["yes", "no"]
        examples.append(
            Example(id=example_id(text, choices), input=text, choices=choices, answer=number % 2)
        )
    return write_task("made", card, examples)


@pytest.fixture
def tasks() -> list[str]:
    pairs = {"ab": ["aaa", "bbb"], "cd": ["ccc", "ddd"], "ef": ["eee", "fff"]}
    return [words_task(name, words) for name, words in pairs.items()]


def trained(base: Path, tasks: list[str], *more: str) -> Any:
    given = [part for task in tasks for part in ("--tasks", task)]
    options = ["--skills", "3", "--rank", "2", "--steps", "12", "--batch-size", "6", *more]
    ran = run_hub("train", "skills", "--base", base, *given, "--name", "many", *options, "--json")
    assert ran.code == 0, ran.err
    return ran.json["expert"]


def route(base: Path, **options: Any) -> dict[str, Any]:
    return {"base": str(base), "experts": ["many"], "route": options}


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_trained_adapted_and_composed(
    kind: str, base_folder: Path, tmp_path: Path, tasks: list[str]
) -> None:
    base = base_folder if kind == "causal" else tiny_bert(tmp_path / "bert")
    expert = trained(base, tasks[:2], "--heads", "4", "--granularity", "layer", "--lr", "0.01")
    loss = expert["training"]["loss"]
    assert loss["last"] < loss["first"]
    shown = run_hub("show", "many")
    assert shown.code == 0 and "skills" in shown.out
    adapted, rates = {}, {}
    for tune in ("all", "z", "mu"):
        given = ["--task", tasks[2], "--tune", tune, "--name", f"new-{tune}", "--shots", "8"]
        ran = run_hub("train", "adapt", "many", *given, "--steps", "3", "--json")
        assert ran.code == 0, ran.err
        training = ran.json["expert"]["training"]
        adapted[tune], rates[tune] = training["trainable"], training["router_lr"]
    n_layers, heads, n_skills = 2, 4, 3
    assert adapted["z"] == n_layers * heads * n_skills
    assert adapted["all"] - adapted["z"] == 3 * adapted["mu"]
    assert rates["z"] == 0.1 and rates["all"] == pytest.approx(10 * training["lr"])
    expert_kinds = {
        n: hub.Registry.read().find_expert(_reference(n)).kind for n in ("new-z", "new-mu")
    }
    assert expert_kinds == {"new-z": "skills", "new-mu": "lora"}
    recipes = {
        "known": hub.Recipe.of(route(base, method="mhr", task=tasks[0])),
        "average": hub.Recipe.of(route(base, method="mhr", task="average")),
        "z": hub.Recipe.of({**route(base, method="mhr"), "experts": ["new-z"]}),
        "mu": hub.Recipe.of({**route(base, method="uniform"), "experts": ["new-mu"]}),
        "by_row": hub.Recipe.of(route(base, method="mhr")),
    }
    found = hub.evaluate(recipes, tasks[:1])["tasks"][0]["methods"]
    assert found["by_row"]["logprob"] == pytest.approx(found["known"]["logprob"], abs=1e-4)
    assert found["known"]["logprob"] > found["base"]["logprob"]


def _reference(name: str) -> Any:
    from experthub.hub.registry.expert import Reference

    return Reference.parse(name)


def test_a_known_task_folds_into_weights_and_comes_apart_again(
    base_folder: Path, tasks: list[str], tmp_path: Path
) -> None:
    trained(base_folder, tasks, "--router", "poly", "--lr", "0.01", "--relaxed")
    base = hub.compose(route(base_folder, method="poly", task="average"))
    plain = base.detach()
    before = logits(plain)
    composition = hub.compose(route(base_folder, method="poly", task=tasks[1]))
    assert not any(type(m).__name__ == "RoutedLinear" for m in composition.model.modules())
    found = logits(composition.model)
    composition.save(tmp_path / "adapter", format="peft")
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), found, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(composition.detach()), before)
    rows = [[5, 77, 130], [9, 33, 12], [4, 4, 8]]
    mixed = hub.compose(route(base_folder, method="poly"))
    with mixed.tasks([tasks[1], "unknown", tasks[0]]):
        several = logits(mixed.model, rows)
    for row, task in enumerate([tasks[1], "average", tasks[0]]):
        alone = hub.compose(route(base_folder, method="poly", task=task))
        torch.testing.assert_close(
            several[row], logits(alone.model, rows)[row], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("router", ["shared", "private"])
def test_baselines(base_folder: Path, tasks: list[str], router: str) -> None:
    expert = trained(base_folder, tasks, "--router", router, "--lr", "0.01")
    inventory = load_file(
        next(Path(hub.Store().root).glob("runs/many-*")) / "expert/skills.safetensors"
    )
    first = inventory["model.layers.0.mlp.up_proj.skill_b"]
    assert len(first) == {"shared": 1, "private": 3}[router]
    shown = [logits(hub.compose(route(base_folder, method="poly", task=t)).model) for t in tasks]
    same = torch.equal(shown[0], shown[1])
    assert same == (router == "shared")
    assert expert["training"]["router"] == router


def test_an_interrupted_run_goes_on(base_folder: Path, tasks: list[str], home: Path) -> None:
    from experthub.hub.training import fit as fitting

    def run(name: str, interrupt: bool = False) -> str:
        count = 0

        def stop(what: str, done: int, total: int) -> None:
            nonlocal count
            count += 1
            if interrupt and done == 23:
                raise KeyboardInterrupt

        settings = fitting.Settings(steps=26, batch_size=4, lr=1e-2)
        shape = hub.InventoryShape(skills=2, rank=2, router="poly")
        made = hub.train_skills(
            str(base_folder), tasks[:2], name, shape, settings, session=hub.Session(report=stop)
        )
        return made.digest

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", interrupt=True)
    assert run("parts") == whole


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"route": {"method": "mhr", "task": "made:ab"}}, "an inventory of poly.*sets method: mhr"),
        ({"route": {"method": "poly", "task": "made:aa"}}, "does not know the task 'made:aa'"),
        ({"route": {"method": "uniform"}}, "which uniform cannot use"),
        ({"route": None, "merge": {"method": "linear"}}, "which linear cannot use"),
        ({"experts": ["many", "many"]}, "2 among its 2 experts"),
        ({"route": {"method": "poly", "combine": "outputs"}}, "poly cannot combine outputs"),
    ],
)
def test_wrong_recipes(
    base_folder: Path, tasks: list[str], change: dict[str, Any], words: str
) -> None:
    trained(base_folder, tasks, "--router", "poly")
    recipe = {**route(base_folder, method="poly"), **change}
    with pytest.raises(UsageError, match=words):
        hub.compose({k: v for k, v in recipe.items() if v is not None})


def test_wrong_commands(base_folder: Path, tasks: list[str], expert_folder: Any) -> None:
    start = ["train", "skills", "--base", base_folder, "--tasks", tasks[0], "--name", "x"]
    for more, words in (
        (["--router", "moe"], "unknown --router 'moe'"),
        (["--router", "poly", "--heads", "2"], "poly has one head"),
        (["--heads", "5"], "heads that divide"),
        (["--tasks", tasks[0]], f"the task {tasks[0]} is named twice"),
    ):
        ran = run_hub(*start, *more)
        assert ran.code == 2 and words in ran.err, ran.err
    run_hub("add", expert_folder(), "--name", "plain", "--base", base_folder)
    ran = run_hub("train", "adapt", "plain", "--task", tasks[0], "--name", "y")
    assert ran.code == 2 and "plain@1 is a LoRA, not an inventory of skills" in ran.err
    lora = {"base": str(base_folder), "experts": ["plain"], "route": {"method": "poly"}}
    with pytest.raises(UsageError, match="poly needs exactly one inventory of skills"):
        hub.compose(lora)


def test_a_base_without_linear_modules_gets_no_skills(tmp_path: Path, tasks: list[str]) -> None:
    """All modules of GPT-2 but its head are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=260, n_embd=24, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(HubError, match="no linear module that can get skills"):
        find_linears(model, read(tmp_path / "gpt2", "gpt2"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r, t: r.update(n_heads=5), "5 heads do not divide|expected"),
        (lambda r, t: r.update(n_skills=2), "expected \\[2"),
        (lambda r, t: r.update(tasks=["a"]), "logits is \\["),
        (lambda r, t: r.update(more=1), "more"),
        (lambda r, t: t.pop("model.layers.0.mlp.up_proj.skill_b"), "is missing"),
        (lambda r, t: t.update(extra=torch.zeros(1)), "extra belongs to no target module"),
        (
            lambda r, t: t["model.layers.1.mlp.up_proj.skill_a"].fill_(float("nan")),
            "holds NaN",
        ),
    ],
)
def test_damaged_inventories_are_refused(
    base_folder: Path, tasks: list[str], tmp_path: Path, damage: Any, words: str
) -> None:
    trained(base_folder, tasks)
    folder = tmp_path / "copy"
    expert = hub.Registry.read().find_expert(_reference("many"))
    folder.mkdir()
    hub.Store().copy_out(expert.digest, folder)
    (folder / "expert.json").unlink(missing_ok=True)
    record = json.loads((folder / "skills.json").read_text())
    tensors = load_file(folder / "skills.safetensors")
    read_folder(folder)
    damage(record, tensors)
    (folder / "skills.json").chmod(0o644)
    (folder / "skills.safetensors").unlink()
    (folder / "skills.json").write_text(json.dumps(record))
    save_file(tensors, folder / "skills.safetensors")
    with pytest.raises((IntegrityError, HubError), match=words):
        read_folder(folder)
