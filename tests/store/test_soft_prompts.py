"""Soft prompts in the registry, the commands and routes; and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import logits, make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.errors import HubError, UsageError
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task
from safetensors.torch import load_file, save_file
from soft_prompts import load_peft, write_adapter


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture
def prompts(base_folder: Path, tmp_path: Path, home: Path, tiny_task: str) -> dict[str, Path]:
    """Two soft prompts and a prefix of the tiny Llama, which are registered by these names."""
    found = {
        "a": write_adapter(load, base_folder, tmp_path / "a", tokens=4, seed=1),
        "b": write_adapter(load, base_folder, tmp_path / "b", tokens=6, seed=2, kind="p-tuning"),
        "c": write_adapter(load, base_folder, tmp_path / "c", tokens=3, seed=3, kind="prefix"),
    }
    for name, folder in found.items():
        done = run_hub("add", folder, "--name", name, "--base", base_folder, "--proof", "--json")
        assert done.code == 0, done.err
    return found


def write_recipe(folder: Path, base: Path, experts: list[Any], **method: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "experts": experts} | method))
    return path


MERGE = {"merge": {"method": "concatenate"}}


def test_registry_and_commands(
    prompts: dict[str, Path], base_folder: Path, tmp_path: Path, tiny_task: str
) -> None:
    shown = run_hub("show", "b", "--json").json
    entry = shown.get("expert", shown)
    text = json.dumps(shown)
    assert '"prompt"' in text and "P_TUNING" in text and "max_difference" in text, entry
    assert run_hub("list").code == run_hub("verify").code == 0
    recipe = write_recipe(tmp_path, base_folder, ["a", "b"], **MERGE)
    for command in (
        ("compose", recipe, "--plan"),
        ("lock", recipe),
        ("compose", recipe, "--locked"),
        ("eval", recipe, "--tasks", tiny_task, "--limit", "6"),
        ("generate", recipe, "--prompt", "hello", "--max-new-tokens", "3"),
        ("compose", recipe, "--out", tmp_path / "both", "--format", "peft"),
        ("push", "a", f"file:{tmp_path / 'shared'}"),
    ):
        done = run_hub(*command)
        assert done.code == 0, (command, done.err)
    composed = hub.compose(recipe).model
    theirs = load_peft(load, base_folder, tmp_path / "both").float()
    ids = torch.tensor([[5, 77, 130, 9, 200, 33, 41]])
    with torch.no_grad():
        right = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 10:]
    torch.testing.assert_close(logits(composed), right, rtol=1e-4, atol=1e-4)
    done = run_hub("compose", recipe, "--out", tmp_path / "model")
    assert done.code == 2 and "no merged model" in done.err and "--format peft" in done.err
    assert not (tmp_path / "model").exists()


def test_eval_is_the_score_of_peft(
    prompts: dict[str, Path], base_folder: Path, tmp_path: Path, tiny_task: str
) -> None:
    """Mean log-probabilities of the choices, by the model of peft alone, one text after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for name, count in {"a": 4, "c": 0}.items():
        recipe = write_recipe(tmp_path, base_folder, [name], **MERGE)
        found = hub.evaluate([recipe], [tiny_task], limit=6, with_samples=True, cache=False)
        theirs = load_peft(load, base_folder, prompts[name]).float()
        task = read_task(tiny_task)
        rows = [one for one in found["samples"] if one["method"] == "recipe"]
        for example, sample in zip(task.split("test", 6), rows, strict=True):
            prompt = tokenizer(task.format_prompt(example))["input_ids"]
            for choice, score in zip(example.choices, sample["scores"], strict=True):
                own = tokenizer(" " + choice)["input_ids"]
                ids = torch.tensor([prompt + own])
                with torch.no_grad():
                    log = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[
                        0, count:
                    ]
                places = log.log_softmax(-1)[len(prompt) - 1 : -1]
                mean = places.gather(1, torch.tensor(own)[:, None]).mean()
                assert abs(float(mean) - score) < 1e-4


def test_route_by_task(prompts: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    """Rows with soft prompts of different lengths, and without any, in one batch."""
    for names in (["a", "b"], ["c"]):
        recipe = write_recipe(
            tmp_path, base_folder, names, route={"method": "task", "unknown": "base"}
        )
        composition = hub.compose(recipe)
        tasks = [*names, "neither"]
        rows = [[5, 77, 130], [9, 200, 33, 41, 12], [8, 7, 30, 21]][: len(tasks)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask}
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        with composition.tasks(tasks), torch.no_grad():
            found = composition.model(**batch).logits
            written = composition.model.generate(**batch, **settings, num_beams=2)
        for i, (task, row) in enumerate(zip(tasks, rows, strict=True)):
            one = write_recipe(tmp_path, base_folder, [task], **MERGE) if task in names else None
            model = hub.compose(one).model if one else load(base_folder)
            torch.testing.assert_close(
                found[i, -len(row) :], logits(model, [row])[0], rtol=1e-4, atol=1e-4
            )
            alone = torch.tensor([row])
            best = model.generate(
                input_ids=alone, attention_mask=torch.ones_like(alone), **settings, num_beams=2
            )
            assert written[i, -5:].tolist() == best[0, -5:].tolist()
        assert torch.equal(logits(composition.detach()), logits(load(base_folder)))
    mixing = write_recipe(tmp_path, base_folder, ["a", "b"], route={"method": "task"})
    composition = hub.compose(mixing)
    with pytest.raises(UsageError, match="mixes several soft prompts"), composition.tasks("other"):
        logits(composition.model)


def test_routes_by_example(base_folder: Path, tmp_path: Path, home: Path) -> None:
    """The soft prompt of each row is that of the most similar examples, or of the best scores."""
    from transformers import AutoTokenizer

    tiny_bert(tmp_path / "encoder")
    words = {"animals": ["cat", "dog", "cow", "hen"], "colours": ["RED", "BLUE", "GREEN", "PINK"]}
    tasks = {name: made_task(name, own) for name, own in words.items()}
    for seed, (name, task) in enumerate(tasks.items()):
        folder = write_adapter(load, base_folder, tmp_path / name, tokens=3 + seed, seed=seed)
        done = run_hub("add", folder, "--name", name, "--base", base_folder, "--task", task)
        assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    texts = {"colours": "RED BLUE PINK RED 1", "animals": "cat dog"}
    encoder = {"examples": 10, "embedder": str(tmp_path / "encoder")}
    alone = {
        name: hub.compose(write_recipe(tmp_path, base_folder, [name], **MERGE)).model
        for name in tasks
    }
    rows = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(list(texts.values()), padding=True, return_tensors="pt")
        for method in ({"method": "retrieval"}, {"method": "lora_retriever", "top_k": 1}):
            recipe = write_recipe(tmp_path, base_folder, [*tasks], route={**method, **encoder})
            model = hub.compose(recipe).model
            with torch.no_grad():
                found = model(**batch).logits
            for own, mask, name in zip(found, batch["attention_mask"], texts, strict=True):
                right = logits(alone[name], [rows[name]])[0]
                torch.testing.assert_close(own[mask.bool()], right, rtol=1e-4, atol=1e-4)
    data = {"tasks": [tasks["animals"]], "labels": True, "limit": 8, "split": "validation"}
    recipe = write_recipe(
        tmp_path, base_folder, [*tasks], route={"method": "best_individual"}, data=data
    )
    composition = hub.compose(recipe)
    scores = {
        name: hub.evaluate(
            {"one": hub.Recipe.of({"base": str(base_folder), "experts": [name], **MERGE})},
            [tasks["animals"]],
            split="validation",
            limit=8,
        )["average"]["one"]["accuracy"]
        for name in tasks
    }
    best = max(scores, key=lambda name: scores[name])
    torch.testing.assert_close(logits(composition.model), logits(alone[best]), rtol=1e-4, atol=1e-4)


def made_task(name: str, words: list[str]) -> str:
    card = Card(name=name, source="made-up", template="{input}")
    examples = []
    for number in range(80):
        text = " ".join(words[(number + k) % 4] for k in range(4)) + f" {number}"
        choices = ["yes", "no"]
        examples.append(
            Example(id=example_id(text, choices), input=text, choices=choices, answer=number % 2)
        )
    return write_task("made", card, examples)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("experts", "more", "what"),
    [
        (["a"], {"merge": {"method": "linear"}}, "linear combines weights"),
        (["a"], {"route": {"method": "arrow"}}, "arrow combines weights"),
        (["a"], {"route": {"method": "smear"}}, "smear combines weights"),
        (["a", "c"], MERGE, "use soft prompts alone"),
        (["a", "lora"], MERGE, "and a recipe has experts of one of these kinds"),
        (["lora"], MERGE, "concatenate takes soft prompts, and lora is a LoRA"),
        ([{"expert": "a", "weight": 0.5}], MERGE, "has the weight 0.5"),
        (["a"], MERGE | {"targets": ".*"}, "targets: selects weights"),
        (["long"], MERGE, "reads at most 512 tokens"),
        (["wide"], MERGE, "48 features, and"),
        (["layers"], MERGE, "3 layers, and"),
        (["heads"], MERGE, "4 heads, and"),
    ],
)
def test_recipes_that_are_refused(
    experts: list[Any],
    more: dict[str, Any],
    what: str,
    prompts: dict[str, Path],
    base_folder: Path,
    tmp_path: Path,
) -> None:
    shapes = {"long": (512, 32), "wide": (4, 48), "layers": (3, 2, 4, 8), "heads": (2, 4, 4, 8)}
    for name, shape in shapes.items():
        (tmp_path / name).mkdir()
        names = ["prompt"] if len(shape) == 2 else ["keys", "values"]
        save_file(
            {n: torch.randn(shape) for n in names}, tmp_path / name / "soft_prompt.safetensors"
        )
    make_expert(tmp_path / "lora", base_folder, 1)
    named = [str(tmp_path / e) if e in (*shapes, "lora") else e for e in map(_plain, experts)]
    recipe = write_recipe(tmp_path, base_folder, named, **more)
    done = run_hub("compose", recipe, "--plan")
    said = (done.err + done.out).replace(str(tmp_path) + "/", "")
    assert done.code in (1, 2) and what in said and "hint:" in said, done.err


def _plain(expert: Any) -> Any:
    return expert if isinstance(expert, str) else dict(expert)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"task_type": None}, "task_type is None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": 7}, "has 4 rows"),
        ({"num_virtual_tokens": "4"}, "num_virtual_tokens is '4'"),
        ({"future": 1}, "unknown key 'future'"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": 2}, "states 4 tokens"),
        ({"peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM"}, "prefix of an encoder"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "no change of the weights"),
    ],
)
def test_adapters_that_are_refused(
    change: dict[str, Any], what: str, base_folder: Path, tmp_path: Path, home: Path
) -> None:
    folder = write_adapter(load, base_folder, tmp_path / "a", num_attention_heads=2)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = run_hub("add", folder, "--name", "a", "--base", base_folder)
    assert done.code == 3 and what in done.err, done.err
    assert run_hub("show", "a").code == 4


def test_damaged_files_are_refused(base_folder: Path, tmp_path: Path, home: Path) -> None:
    folder = write_adapter(load, base_folder, tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for made, what in (
        ({"prompt_embeddings": tensors["prompt_embeddings"] * float("nan")}, "NaN"),
        (tensors | {"score.weight": torch.ones(2, 2)}, "expected one tensor"),
    ):
        save_file(made, weights)
        done = run_hub("add", folder, "--name", "a", "--base", base_folder)
        assert done.code == 3 and what in done.err, done.err
    for number, (shape, names) in enumerate(
        [((0, 4), ["prompt"]), ((2, 2, 2), ["prompt"]), ((2, 2, 2, 2), ["keys"])]
    ):
        own = tmp_path / str(number)
        own.mkdir()
        save_file({n: torch.zeros(shape) for n in names}, own / "soft_prompt.safetensors")
        assert run_hub("add", own, "--name", "a", "--base", base_folder).code == 3


def test_a_wide_adapter_is_not_registered(base_folder: Path, tmp_path: Path, home: Path) -> None:
    folder = write_adapter(load, base_folder, tmp_path / "a", token_dim=48)
    done = run_hub("add", folder, "--name", "a", "--base", base_folder)
    assert done.code == 1 and "48 features" in done.err, done.err
    assert run_hub("show", "a").code == 4
    with pytest.raises(HubError, match="48 features"):
        hub.compose({"base": str(base_folder), "experts": [str(folder)], **MERGE})
