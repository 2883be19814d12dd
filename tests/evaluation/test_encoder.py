"""Experts of a sentence encoder: labels scored by their own text, trained, merged and routed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.bases.base import Base, read
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.errors import UsageError
from experthub.hub.evaluation.routing_map import map_routing
from experthub.hub.formats.adapter import GATES
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.similarity import SCALE, Similarity, pool
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.training.fit import Settings
from experthub.hub.training.objectives import SimilarityLoss

LINEARS = ("query", "key", "value", "dense")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def encoder(folder: Path) -> Base:
    return read(folder, str(folder))


@pytest.fixture
def colours() -> str:
    """Make a task that asks for the colour in a sentence, with fixed labels."""
    labels, words = ["red", "green", "blue"], ["fire", "grass", "sea"]
    examples = []
    for n in range(240):
        text = f"{['the', 'a', 'an'][n % 2]} {words[n % 3]} {n}"
        answer = labels[n % 3]
        examples.append(Example(id=example_id(text, labels), input=text, targets=[answer]))
    card = Card(name="colours", source="made-up", kind="labels", labels=labels)
    return write_task("local", card, examples)


def embedding(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """One text alone, pooled by hand."""
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    mean = hidden.sum(0) / len(hidden)
    return mean / mean.norm()


def test_scores_are_scaled_cosines_whatever_the_batch(folder: Path, encoder: Base) -> None:
    tokenizer, base = load_tokenizer(encoder), load_model(encoder, "float32", None)
    expert = str(make_expert(folder.parent / "scored", folder, 1, targets=LINEARS))
    recipe = {"base": str(folder), "experts": [expert], "merge": {"method": "linear"}}
    model = hub.compose(recipe, model=base).model
    texts = ["a", "a much longer text than the first", "mid one"]
    choices = ("red", "a long label", "x")
    scorer = Similarity(lambda: base, tokenizer)
    found = scorer.scores(model, [Question(text, choices) for text in texts])
    for text, scores in zip(texts, found, strict=True):
        heads = [embedding(base, tokenizer, choice) for choice in choices]
        expected = [SCALE * float(head @ embedding(model, tokenizer, text)) for head in heads]
        assert scores.values == pytest.approx(expected, abs=1e-4)
        assert scores.by("mean", choices) == scores.by("sum", choices) == list(scores.values)


def test_the_loss_is_the_cross_entropy_of_the_scores(encoder: Base, colours: str) -> None:
    """Whatever number of choices the examples of a batch have."""
    model, tokenizer = load_model(encoder, "float32", None), load_tokenizer(encoder)
    scorer = Similarity(lambda: model, tokenizer)
    objective = SimilarityLoss(scorer)
    card = Card(name="x", source="made-up")
    examples = [
        Example(id="0", input="fire", choices=["red", "blue"], answer=1),
        Example(id="1", input="the sea by night", choices=["red", "x", "blue"], answer=2),
    ]
    from experthub.hub.tasks.task import Task

    task = Task("x", card, tuple(examples))
    batch = objective.collate([objective.encode(task, e) for e in examples])
    loss = objective.compute_loss(model, batch)
    expected = []
    for example in examples:
        row = torch.tensor(scorer.scores(model, [scorer.question(task, example)])[0].values)
        expected.append(-row.log_softmax(0)[example.answer or 0])
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)


def test_an_answer_that_is_not_a_choice_is_refused(folder: Path) -> None:
    """Training would take it for the first choice."""
    examples = [Example(id=example_id(f"{n}", ()), input=f"{n}", targets=["y"]) for n in range(40)]
    free = write_task("local", Card(name="free", source="made-up"), examples)
    other = Card(name="other", source="made-up", labels=["a", "b"])
    for task in (free, write_task("local", other, examples)):
        ran = run_hub("train", "lora", "--base", folder, "--task", task, "--name", "x")
        assert ran.code == 2 and "has no choices, or its answer is not among them" in ran.err


def test_an_expert_learns_labels_and_is_routed(folder: Path, colours: str) -> None:
    settings = Settings(steps=60, batch_size=16, lr=2e-2)
    expert = hub.train_lora(str(folder), colours, "colours", settings)
    store = hub.Store()
    adapted = read_header(store.locate(expert.digest, "adapter_model.safetensors"))
    assert adapted and not [name for name in adapted if "pooler" in name]
    gated = hub.train_gate("colours", Settings(steps=5, lr=5e-3))
    assert GATES in store.read_identity(gated.digest).files
    other = str(make_expert(folder.parent / "other", folder, 2, targets=("query",), size=0.1))
    recipe = {"base": str(folder), "experts": ["colours", other], "route": {"method": "phatgoose"}}
    alone = {"base": str(folder), "experts": ["colours"], "merge": {"method": "linear"}}
    recipes = {"routed": hub.Recipe.of(recipe), "alone": hub.Recipe.of(alone)}
    found = hub.evaluate(recipes, [colours], controls=True)
    assert found["protocol"]["score"] == "label-cosine"
    assert found["average"]["alone"]["delta_to_base"]["ci95"][0] > 0
    assert found["controls"]["best_individual"] == "colours@2"
    shown = map_routing(hub.Recipe.of(recipe), [colours])
    assert (shown["experts"], shown["layers"]) == (["colours", "other"], [0, 1])
    for row in shown["weights"]:
        # Where only one of them adapts a module, it has all of the weight there.
        assert sum(row) == pytest.approx(1)


def test_a_merge_of_encoder_experts_is_a_folder_for_transformers(
    folder: Path, encoder: Base, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    expert = str(make_expert(tmp_path / "e", folder, 3, targets=LINEARS))
    recipe = {"base": str(folder), "experts": [expert], "merge": {"method": "linear"}}
    composition = hub.compose(recipe)
    tokenizer = load_tokenizer(encoder)
    batch = tokenizer(["one text", "and another"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = pool(composition.model, batch)
        whole = AutoModel.from_pretrained(composition.save(tmp_path / "whole"))
        torch.testing.assert_close(pool(whole, batch), expected)
        bare = AutoModel.from_pretrained(folder)
        adapter = composition.save(tmp_path / "adapter", format="peft")
        adapted = PeftModel.from_pretrained(bare, adapter)
        torch.testing.assert_close(pool(adapted, batch), expected, atol=1e-4, rtol=1e-4)


def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, folder: Path, colours: str, recipe_of: Callable[[Path], hub.Recipe]
) -> None:
    import shutil

    from transformers import BertConfig, BertForTokenClassification

    other = tmp_path / "classifier"
    shutil.copytree(folder, other)
    BertForTokenClassification(BertConfig.from_pretrained(folder)).save_pretrained(other)
    with pytest.raises(UsageError, match="which cannot score choices"):
        hub.evaluate({"x": recipe_of(other)}, [colours])


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[[Path], hub.Recipe]:
    def of(base: Path) -> hub.Recipe:
        expert = str(make_expert(tmp_path / "any", base, 1, targets=("query",)))
        merge = {"method": "linear"}
        return hub.Recipe.of({"base": str(base), "experts": [expert], "merge": merge})

    return of
