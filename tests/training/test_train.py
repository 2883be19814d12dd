"""Training real (tiny) experts and gates."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub, tiny_bert
from experthub import hub
from experthub.hub.errors import UsageError
from experthub.hub.files.atomic import hub_home
from experthub.hub.formats.adapter import GATES
from experthub.hub.formats.task_vector import TASK_VECTOR
from experthub.hub.readers.likelihood import encode
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.training.fit import Settings
from experthub.hub.training.full import train_full
from experthub.hub.training.objectives import AnswerLoss
from experthub.hub.training.train import train_gate, train_lora
from safetensors.torch import load_file

SETTINGS = Settings(steps=40, batch_size=8, lr=1e-2)


@pytest.fixture
def letters() -> str:
    """Make a task that asks which of two letters was named, which a tiny model can learn."""
    card = Card(name="letters", source="made-up", template="{input} =")
    examples = []
    for n in range(160):
        text, choices = f"{n} {'xy'[n % 2]}", ["p", "q"]
        examples.append(
            Example(id=example_id(text, choices), input=text, choices=choices, answer=n % 2)
        )
    return write_task("local", card, examples)


class Stop(BaseException):
    pass


def stop_at(step: int) -> Any:
    def report(what: str, done: int, size: int) -> None:
        if what.startswith("training") and done == step:
            raise Stop

    return report


def test_an_expert_and_its_gate_learn(base_folder: Path, letters: str, home: Path) -> None:
    expert = train_lora(str(base_folder), letters, "letters", SETTINGS)
    loss = expert.training["loss"]
    assert loss["last"] < 0.5 * loss["first"]
    curve = json.loads(next((home / "runs").glob("letters-*/loss.json")).read_text())
    assert len(curve) == SETTINGS.steps
    store = hub.Store()
    weights = load_file(store.verify_file(expert.digest, "adapter_model.safetensors"))
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    recipe = {"base": str(base_folder), "experts": ["letters@1"], "merge": {"method": "linear"}}
    result = hub.evaluate({"trained": hub.Recipe.of(recipe)}, [letters])
    assert result["tasks"][0]["methods"]["trained"]["delta_to_base"]["ci95"][0] > 0

    gated = train_gate("letters", Settings(steps=5, lr=5e-3))
    assert (gated.version, gated.task) == (2, letters)
    gates = load_file(store.verify_file(gated.digest, GATES))
    adapted = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in weights}
    assert {n.removesuffix(".gate") for n in gates} == adapted
    assert all(g.ndim == 1 and bool(g.abs().sum() > 0) for g in gates.values())
    same = load_file(store.verify_file(gated.digest, "adapter_model.safetensors"))
    assert all(torch.equal(same[n], weights[n]) for n in weights)
    routed = {"base": str(base_folder), "experts": ["letters"], "route": {"method": "phatgoose"}}
    assert hub.compose(routed).plan.members[0].digest == gated.digest
    assert Registry.read().find_expert(Reference.parse("letters@1")).digest == expert.digest


@pytest.mark.parametrize("learned", [0.0, 1e9])
def test_gates_of_an_expert_without_a_loss_are_remarked_on(
    base_folder: Path, letters: str, learned: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experthub.hub.training.train.LEARNED", learned)
    train_lora(str(base_folder), letters, "letters", Settings(steps=1))
    said: list[str] = []
    train_gate(
        "letters", Settings(steps=1), session=Session(report=lambda what, *_: said.append(what))
    )
    notes = [text for text in said if text.startswith("note: ")]
    assert len(notes) == bool(learned) and all("no reason to open" in n for n in notes)
    said.clear()
    train_gate(
        "letters@1",
        Settings(steps=1),
        start=0.1,
        session=Session(report=lambda what, *_: said.append(what)),
    )
    assert not [text for text in said if text.startswith("note: ")]


def test_gates_may_start_nearly_closed(base_folder: Path, letters: str) -> None:
    train_lora(str(base_folder), letters, "letters", SETTINGS)
    gate = Settings(steps=3, lr=5e-3)
    paper = train_gate("letters@1", gate)
    closed = train_gate("letters@1", gate, start=0.1)
    assert closed.digest != paper.digest
    assert (paper.training["gate"].get("start"), closed.training["gate"]["start"]) == (None, 0.1)
    assert closed.training["gate"]["loss"]["first"] > paper.training["gate"]["loss"]["first"]
    for start in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="cannot start at"):
            train_gate("letters@1", gate, start=start)


TRAIN = """
import sys
from experthub.hub.training.fit import Settings
from experthub.hub.training.train import train_gate, train_lora
settings = Settings(steps=2, batch_size=8)
print(train_lora(sys.argv[1], sys.argv[2], "x", settings).digest)
print(train_gate("x", settings).digest)
"""


@pytest.mark.slow
def test_the_digest_is_the_same_in_every_process(base_folder: Path, letters: str) -> None:
    """Whatever order Python's sets have: peft writes some of them into its configuration."""
    found = []
    for seed in ("1", "2"):
        shutil.rmtree(hub_home() / "runs", ignore_errors=True)
        shutil.rmtree(hub_home() / "registry", ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, base_folder, letters],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout)
    assert found[0] == found[1] and found[0].count("sha256:") == 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["lora", "full", "gate"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    kind: str, base_folder: Path, letters: str
) -> None:
    settings = Settings(steps=24, lr=1e-2)
    if kind == "lora":
        whole = train_lora(str(base_folder), letters, "whole", settings)

        def again(**options: Any) -> Any:
            return train_lora(str(base_folder), letters, "parts", settings, **options)
    elif kind == "full":
        whole = train_full(str(base_folder), letters, "whole", settings).expert

        def again(**options: Any) -> Any:
            return train_full(str(base_folder), letters, "parts", settings, **options).expert
    else:
        train_lora(str(base_folder), letters, "parts", Settings(steps=2))
        train_lora(str(base_folder), letters, "whole", Settings(steps=2))
        whole = train_gate("whole@1", settings)

        def again(**options: Any) -> Any:
            return train_gate("parts@1", settings, **options)

    with pytest.raises(Stop):
        again(session=Session(report=stop_at(22)))
    steps: list[int] = []
    resumed = again(session=Session(report=lambda what, done, size: steps.append(done)))
    assert next(done for done in steps if done) == 21, "it started again from nothing"
    assert resumed.digest == whole.digest


def test_a_full_fine_tune_learns_and_is_kept_exactly(
    base_folder: Path, letters: str, tmp_path: Path
) -> None:
    """The base plus the stored change is the model of --out; embeddings change on request only."""
    words = ("train", "full", "--base", base_folder, "--task", letters, "--steps", "30")
    words = (*words, "--lr", "3e-3", "--name", "letters", "--json")
    ran = run_hub(*words, "--out", tmp_path / "tuned")
    assert ran.code == 0, ran.err
    training = ran.json["expert"]["training"]
    assert training["method"] == "full" and training["relative_error"] == 0
    assert training["loss"]["last"] < 0.5 * training["loss"]["first"]
    digest = ran.json["expert"]["digest"]
    changed = load_file(hub.Store().verify_file(digest, TASK_VECTOR))
    assert "model.norm.weight" in changed and not any("embed" in name for name in changed)
    merge = {"method": "task_arithmetic", "scale": 1.0}
    recipe = {"base": str(base_folder), "experts": ["letters"], "merge": merge}
    model = hub.compose(recipe).model
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    for name, weight in tuned.items():
        torch.testing.assert_close(model.get_parameter(name), weight, atol=1e-6, rtol=1e-6)
    result = hub.evaluate({"full": hub.Recipe.of(recipe)}, [letters])
    assert result["tasks"][0]["methods"]["full"]["delta_to_base"]["ci95"][0] > 0
    assert run_hub(*words, "--out", tmp_path / "tuned").code == 6, "the folder is in use"
    again = run_hub("diff", base_folder, tmp_path / "tuned", "--name", "again", "--json")
    assert load_file(
        hub.Store().verify_file(again.json["expert"]["digest"], TASK_VECTOR)
    ).keys() == (changed.keys())
    short = Settings(steps=2, lr=1e-3)
    more = train_full(str(base_folder), letters, "more", short, embeddings=True).expert
    assert "model.embed_tokens.weight" in load_file(
        hub.Store().verify_file(more.digest, TASK_VECTOR)
    )


def test_an_encoder_is_fine_tuned_but_for_its_pooler(letters: str, tmp_path: Path) -> None:
    base = tiny_bert(tmp_path / "bert")
    made = train_full(str(base), letters, "letters", Settings(steps=3, lr=1e-3))
    changed = load_file(hub.Store().verify_file(made.expert.digest, TASK_VECTOR))
    assert not [n for n in changed if "pooler" in n or n.endswith("embeddings.weight")]
    assert {"embeddings.LayerNorm.weight", "encoder.layer.0.output.dense.bias"} <= set(changed)


def test_a_gate_needs_to_know_the_experts_task(base_folder: Path, expert_folder: Any) -> None:
    from experthub.hub.transfer.describe import add_folder

    add_folder(expert_folder(1), "foreign", Session())
    with pytest.raises(UsageError, match="which task"):
        train_gate("foreign", SETTINGS)


def test_gates_belong_to_a_lora(letters: str, tmp_path: Path) -> None:
    base = tiny_bert(tmp_path / "bert")
    train_full(str(base), letters, "whole", Settings(steps=3, lr=1e-3))
    with pytest.raises(UsageError, match="gates belong to a LoRA"):
        train_gate("whole", SETTINGS)


def test_loss_is_the_mean_cross_entropy_of_the_answers(base_model: Any, base: Any) -> None:
    from experthub.hub.bases.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    pairs = [("short", " ab"), ("a longer prompt", " c"), ("mid", " long answer")]
    rows = []
    expected = []
    for prompt, answer in pairs:
        item = encode(tokenizer, prompt, [answer])[0]
        ids = [*item.prompt, *item.choices[0]]
        rows.append((ids, len(item.prompt)))
        logprobs = base_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        picked = [logprobs[t - 1, ids[t]] for t in range(len(item.prompt), len(ids))]
        expected.append(-torch.stack(picked).mean())
    answers = AnswerLoss(tokenizer)
    loss = answers.compute_loss(base_model, answers.collate(rows))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_a_session_knows_what_was_trained_in_it(base_folder: Path, letters: str) -> None:
    session, settings = Session(), Settings(steps=1)
    session.registry.list_experts()  # reads them before there is the new one
    made = train_lora(str(base_folder), letters, "mine", settings, session=session)
    assert session.registry.find_expert(Reference.parse("mine")) == made
    assert train_gate("mine", settings, session=session).version == 2
