"""Train the starter experts and their gates from nothing, measure them, and write them here.

Usage: python examples/experts/build.py [NAME ...]

Stages that are done already (in $HUB_HOME) are skipped; an interrupted one goes on from its last
checkpoint.  The weights are those of the same seed on the same kind of machine; another CPU or
thread count may round differently.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from experthub import hub
from experthub.hub.describe import add_folder, write_description
from experthub.hub.errors import NotFoundError
from experthub.hub.expert import Reference, Score

HERE = Path(__file__).resolve().parent
REGISTRY = HERE.parent.parent / "registry.yaml"
BASE = "smollm2-135m-instruct"
GATE = hub.Settings(steps=30, lr=5e-3)
TEST_EXAMPLES = 150


@dataclass(frozen=True)
class Starter:
    """One expert: its task, how long it is trained, and what the registry says of it."""

    name: str
    task: str
    steps: int
    description: str
    tags: tuple[str, ...]
    examples: int = 480

    @property
    def draft(self) -> str:
        """Its name in the user's own registry until it is published."""
        return f"{self.name}-draft"


STARTERS = (
    Starter(
        "sentiment",
        "bigbench:multiemo/all_sentence_en",
        80,
        "Sentiment of a sentence from a review: positive, negative, neutral or ambivalent.",
        ("sentiment", "classification", "english"),
    ),
    Starter(
        "intent-recognition",
        "bigbench:intent_recognition",
        50,
        "Intent of an utterance to a voice assistant, one of seven.",
        ("intent", "classification", "english"),
    ),
    Starter(
        "question-typing",
        "bigbench:natural_instructions/subtask046_miscellaenous_question_typing",
        80,
        "Type of the answer that a question asks for: a date, a place, a person, ...",
        ("questions", "classification", "english"),
    ),
    Starter(
        "adjective-order",
        "bigbench:hyperbaton",
        60,
        "Which of two sentences has its adjectives in the usual English order.",
        ("grammar", "multiple choice", "english"),
    ),
    Starter(
        "social-support",
        "bigbench:social_support",
        70,
        "Whether a reply in an online conversation is supportive, neutral or unsupportive.",
        ("sentiment", "conversation", "classification", "english"),
    ),
    Starter(
        "goal-inference",
        "bigbench:goal_step_wikihow/goal_inference",
        100,
        "The goal that a step of a how-to guide serves, one of four.",
        ("commonsense", "inference", "multiple choice", "english"),
        800,
    ),
    Starter(
        "epistemic-reasoning",
        "bigbench:epistemic_reasoning",
        60,
        "Whether a premise about what somebody knows or believes entails a hypothesis.",
        ("inference", "entailment", "english"),
    ),
    Starter(
        "movie-recommendation",
        "bigbench:movie_recommendation",
        60,
        "The movie most similar to four others, one of four.",
        ("recommendation", "multiple choice", "english"),
    ),
    Starter(
        "ruin-names",
        "bigbench:ruin_names",
        60,
        "The humorous one-letter edit of an artist's or movie's name, one of four.",
        ("humor", "multiple choice", "english"),
    ),
    Starter(
        "temporal-presence",
        "bigbench:natural_instructions/subtask018_mctaco_temporal_reasoning_presence",
        70,
        "Whether a sentence answers a question about time.",
        ("time", "reading", "english"),
    ),
)


def report(what: str, done: int, size: int) -> None:
    if size and (done == size or done % 10 == 0):
        print(f"{what}: {done}/{size}", flush=True)


def known(reference: str) -> bool:
    try:
        hub.Registry.read().expert(Reference.parse(reference))
    except NotFoundError:
        return False
    return True


def train(starter: Starter) -> None:
    settings = hub.Settings(steps=starter.steps, examples=starter.examples)
    if not known(f"{starter.draft}@1"):
        print(f"{starter.name}: training", flush=True)
        print(hub.train_lora(BASE, starter.task, starter.draft, settings, report=report).training)


def gate(starter: Starter) -> None:
    if not known(f"{starter.draft}@2"):
        print(f"{starter.name}: training gates", flush=True)
        print(hub.train_gate(f"{starter.draft}@1", GATE, report=report).training)


def measure(starter: Starter) -> Score:
    """The expert beside its base, on test examples that its training did not see."""
    recipe = hub.Recipe.of(
        {"base": BASE, "experts": [f"{starter.draft}@2"], "merge": {"method": "linear"}}
    )
    result = hub.evaluate({"expert": recipe}, [starter.task], limit=TEST_EXAMPLES, report=report)
    row = result["tasks"][0]
    found = row["methods"]["expert"]
    low, high = (round(x, 4) for x in found["delta_to_base"]["ci95"])
    return Score(
        task=starter.task,
        split="test",
        metric="accuracy",
        n=row["n"],
        base=round(row["methods"]["base"]["accuracy"], 4),
        expert=round(found["accuracy"], 4),
        delta_ci95=(low, high),
    )


def publish(starter: Starter) -> None:
    """Write the folder with its description, and the entry in the starter registry."""
    score = measure(starter)
    print(starter.name, score, flush=True)
    if score.delta_ci95 is None or score.delta_ci95[0] <= 0:
        sys.exit(f"{starter.name} does not clearly beat its base: not published")
    expert = hub.Registry.read().expert(Reference.parse(f"{starter.draft}@2"))
    folder = HERE / starter.name
    shutil.rmtree(folder, ignore_errors=True)
    store = hub.Store()
    store.copy_out(expert.digest, folder)
    described = expert.model_copy(
        update={
            "name": starter.name,
            "version": 1,
            "description": starter.description,
            "tags": list(starter.tags),
            "scores": [score],
        }
    )
    write_description(folder, described, store.identity(expert.digest))
    add_folder(folder, starter.name, hub.Registry.read(), store, version=1, file=REGISTRY)


def main(names: list[str]) -> None:
    torch.set_num_threads(2)
    starters = [s for s in STARTERS if not names or s.name in names]
    for stage in (train, gate, publish):
        for starter in starters:
            stage(starter)


if __name__ == "__main__":
    main(sys.argv[1:])
