"""Train the starter experts and their gates from scratch, measure them, and write them to this folder.

Usage: python examples/experts/build.py [NAME ...]

Stages that are already done (in $HUB_HOME) are skipped. An interrupted stage resumes from its last
checkpoint. The same seed gives the same weights on the same kind of machine. Another CPU or number of
threads may round differently.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from experthub import hub
from experthub.hub.errors import NotFoundError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_text
from experthub.hub.files.memory import reuse_memory
from experthub.hub.registry.expert import Reference, Score
from experthub.hub.session import Session
from experthub.hub.tasks.task_files import read_task
from experthub.hub.transfer.describe import add_folder, write_description

HERE = Path(__file__).resolve().parent
REGISTRY = HERE.parent.parent / "registry.yaml"
BASE, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
GATE = hub.Settings(steps=30, lr=5e-3)
TEST_EXAMPLES = 255


@dataclass(frozen=True)
class Starter:
    """One starter expert: its task, its training, and its description in the registry.

    Attributes:
        name: The name in the starter registry.
        task: The task that it is trained on.
        steps: The number of training steps.
        description: The description in the registry.
        tags: The tags in the registry.
        examples: The number of training examples, at most.
        base: The base.
        batch_size: The number of examples per step.
    """

    name: str
    task: str
    steps: int
    description: str
    tags: tuple[str, ...]
    examples: int = 480
    base: str = BASE
    batch_size: int = 8

    @property
    def draft(self) -> str:
        """The name in the user's own registry until the expert is published."""
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
        "goal-inference",
        "bigbench:goal_step_wikihow/goal_inference",
        100,
        "The goal that a step of a how-to guide serves, one of four.",
        ("commonsense", "inference", "multiple choice", "english"),
        800,
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
        "fact-checking",
        "bigbench:fact_checker/fever",
        100,
        "Whether a claim is true.",
        ("knowledge", "english"),
        800,
    ),
    Starter(
        "unanswerable",
        "bigbench:bbq_lite_json/age_ambig",
        40,
        "The choice that says: the passage does not tell.",
        ("reading", "multiple choice", "english"),
    ),
    *(
        Starter(f"{name}-minilm", f"bigbench:{task}", 60, text, tags, 1000, ENCODER, 16)
        for name, task, text, tags in (
            ("intents", "intent_recognition", "Intent of an utterance.", ("intent",)),
            (
                "question-types",
                "natural_instructions/subtask046_miscellaenous_question_typing",
                "Type of the answer that a question asks for.",
                ("questions",),
            ),
            ("sentiment", "multiemo/all_sentence_en", "Sentiment of a review.", ("sentiment",)),
            ("ruin-names", "ruin_names", "Humorous edit of a name.", ("humor",)),
            ("movies", "movie_recommendation", "Movie similar to others.", ("recommendation",)),
            ("goals", "goal_step_wikihow/goal_inference", "Goal of a step.", ("commonsense",)),
            ("claims", "fact_checker/fever", "Truth of a claim.", ("knowledge",)),
            ("unanswerable", "bbq_lite_json/age_ambig", "What a text does not say.", ("reading",)),
        )
    ),
)


def report(what: str, done: int, size: int) -> None:
    """Print every tenth step of a stage, and the last."""
    if size and (done == size or done % 10 == 0):
        print(f"{what}: {done}/{size}", flush=True)


def known(reference: str) -> bool:
    """Return whether the registry has an expert of this name and version."""
    try:
        hub.Registry.read().find_expert(Reference.parse(reference))
    except NotFoundError:
        return False
    return True


def train(starter: Starter) -> None:
    """Train an expert unless it exists."""
    settings = hub.Settings(starter.steps, starter.examples, starter.batch_size)
    if not known(f"{starter.draft}@1"):
        print(f"{starter.name}: training", flush=True)
        print(
            hub.train_lora(
                starter.base,
                starter.task,
                starter.draft,
                settings,
                session=hub.Session(report=report),
            ).training
        )


def gate(starter: Starter) -> None:
    """Train the gates of an expert unless they exist."""
    if not known(f"{starter.draft}@2"):
        print(f"{starter.name}: training gates", flush=True)
        print(
            hub.train_gate(f"{starter.draft}@1", GATE, session=hub.Session(report=report)).training
        )


def constant(task: str) -> float:
    """Return how often the most common answer is right in the test split.

    Args:
        task: The task.

    Returns:
        The share, or 0 if the examples have different choices.
    """
    found = read_task(task)
    examples = found.split("test", TEST_EXAMPLES)
    if len({tuple(found.list_choices(example)) for example in examples}) > 1:
        return 0.0
    answers = [found.find_answer(example) for example in examples]
    return max(map(answers.count, answers)) / len(answers)


def measure(starter: Starter) -> tuple[Score, bool]:
    """Score the expert next to its base, on test examples that its training did not see.

    Args:
        starter: The expert.

    Returns:
        The score, and whether the expert counts: it must be clearly better than the base, and than
        giving one answer to everything.
    """
    recipe = hub.Recipe.of(
        {"base": starter.base, "experts": [f"{starter.draft}@2"], "merge": {"method": "linear"}}
    )
    result = hub.evaluate(
        {"expert": recipe}, [starter.task], limit=TEST_EXAMPLES, session=hub.Session(report=report)
    )
    row = result["tasks"][0]
    found = row["methods"]["expert"]
    low, high = (round(x, 4) for x in found["delta_to_base"]["ci95"])
    score = Score(
        task=starter.task,
        split="test",
        metric="accuracy",
        n=row["n"],
        base=round(row["methods"]["base"]["accuracy"], 4),
        expert=round(found["accuracy"], 4),
        delta_ci95=(low, high),
    )
    return score, low > 0 and found["ci95"][0] > constant(starter.task)


def publish(starter: Starter) -> None:
    """Write the expert's folder with its description, and its entry in the starter registry.

    An expert that does not count is not published.

    Args:
        starter: The expert.
    """
    score, counts = measure(starter)
    print(starter.name, score, flush=True)
    if not counts:
        print(
            f"{starter.name} is not clearly better than its base and than "
            f"{constant(starter.task):.3f}, the accuracy of one answer to everything: not published",
            flush=True,
        )
        return
    expert = hub.Registry.read().find_expert(Reference.parse(f"{starter.draft}@2"))
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
            "license": "apache-2.0",
            "scores": [score],
        }
    )
    write_description(folder, described, store.read_identity(expert.digest))
    forget(starter.name)
    add_folder(folder, starter.name, Session(store=store), version=1, file=REGISTRY)


def forget(name: str) -> None:
    """Remove an expert from the starter registry, so that its new version can take its place.

    Args:
        name: The name of the expert.
    """
    document = yaml_files.read(REGISTRY).value
    document["experts"] = [e for e in document["experts"] if e["name"] != name]
    write_text(REGISTRY, yaml_files.dump(document))


def main(names: list[str]) -> None:
    """Run all stages.

    Args:
        names: The names of the experts, or none for all.
    """
    torch.set_num_threads(2)
    reuse_memory()
    starters = [s for s in STARTERS if not names or s.name in names]
    for stage in (train, gate, publish):
        for starter in starters:
            stage(starter)


if __name__ == "__main__":
    main(sys.argv[1:])
