"""Time the scoring of multiple-choice examples against lm-evaluation-harness, and compare decisions.

Both sides use the same model, prompts and choices in float32 with two threads. The times include
tokenising and exclude loading.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _bench import BASE, THREADS, Times, arguments, finish, run_rounds, surroundings, timed
from _peer import OFFLINE, Peer, environment
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.readers.likelihood import encode, score_choices
from experthub.hub.session import Session
from experthub.hub.tasks.task_files import read_task

HERE = Path(__file__).parent
TASKS = (
    "bigbench:social_iqa",
    "bigbench:goal_step_wikihow/goal_inference",
    "bigbench:disambiguation_qa",
    "bigbench:similarities_abstraction",
)
EXAMPLES, TUNED, TARGET = 32, 16, 2.0
BATCHES = (2, 4, 8, 16, 32)  # for lm-eval, because its `auto` takes longer than a task
PINS = ("lm_eval[hf]==0.4.13", "datasets==5.2.0", "evaluate==0.4.6")
SHARED = ("torch", "transformers", "tokenizers")  # packages in the same version as ours


@dataclass(frozen=True)
class Question:
    """One example, as both sides get it.

    Attributes:
        prompt: The text before the choice.
        choices: The choices, without the space before them.
        answer: The place of the right choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Scored:
    """The scores of one example on one side, choice by choice.

    Attributes:
        ids: The token ids of the text before each choice, and of the choice.
        sums: The sum of the log-probabilities of each choice's tokens.
    """

    ids: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    sums: tuple[float, ...]

    @property
    def means(self) -> tuple[float, ...]:
        """Log-probability per token of the choice."""
        return tuple(s / len(choice) for s, (_, choice) in zip(self.sums, self.ids, strict=True))


class LmEval(Peer):
    """The script `_lm_eval.py` in its own virtual environment.

    Args:
        cache: The folder of the virtual environments.
        model: The folder of the model.
        folder: A folder for tasks and caches.
    """

    def __init__(self, cache: Path, model: Path, folder: Path) -> None:
        python = environment(cache / "lm-eval-venv", SHARED, PINS)
        home = {"HF_HOME": str(folder / "hf")}
        super().__init__(python, "_lm_eval.py", model, variables=OFFLINE | home)
        self._folder = folder

    def score(self, name: str, questions: Sequence[Question]) -> list[Scored]:
        """Evaluate the questions as a local task.

        Args:
            name: The name of the task.
            questions: The examples.

        Returns:
            The scores of each example.

        Raises:
            RuntimeError: If lm-eval reads another text, or if its `acc` does not follow from its sums.
        """
        file = self._folder / f"{name}.jsonl"
        rows = (
            {"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in questions
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        scored = []
        answers = self.ask(json.dumps(["score", name, str(file)]))
        for question, answer in zip(questions, answers, strict=True):
            expected = [question.prompt + text for text in after(question)]
            if ["".join(texts) for texts in answer["texts"]] != expected:
                raise RuntimeError(f"lm-eval reads {answer['texts']}, expected {expected}")
            if (best(answer["sums"]) == question.answer) != bool(answer["acc"]):
                raise RuntimeError(f"acc {answer['acc']} does not follow from {answer['sums']}")
            ids = tuple((tuple(context), tuple(choice)) for context, choice in answer["ids"])
            scored.append(Scored(ids, tuple(answer["sums"])))
        return scored

    def seconds(self, name: str, batch: int, examples: int) -> float:
        """Time lm-eval's log-likelihoods of the first examples of a scored task, with a batch size."""
        taken: float = self.ask(json.dumps(["seconds", name, batch, examples]))
        return taken


def after(question: Question) -> list[str]:
    """Return the texts that may follow the prompt: every choice after one space."""
    return [" " + choice for choice in question.choices]


def score(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[Scored]:
    """Tokenise the questions and score their choices with experthub.

    Args:
        model: The model.
        tokenizer: The tokenizer of the model.
        questions: The examples.

    Returns:
        The scores of each example.
    """
    encoded = [encode(tokenizer, question.prompt, after(question)) for question in questions]
    sums = iter(score_choices(model, [item for items in encoded for item in items]))
    return [
        Scored(
            tuple((item.prompt, choice) for item in items for choice in item.choices),
            tuple(value for _ in items for value in next(sums)),
        )
        for items in encoded
    ]


def best(values: Sequence[float]) -> int:
    """Return the place of the highest value, and of several the first, like numpy's argmax."""
    return max(range(len(values)), key=values.__getitem__)


def margin(values: Sequence[float]) -> float:
    """Return the difference of the highest and the second highest value."""
    first, second = sorted(values, reverse=True)[:2]
    return first - second


def compare(ours: Sequence[Scored], theirs: Sequence[Scored]) -> dict[str, Any]:
    """Count where the two sides agree and differ.

    A tie is an example whose best two choices are equal to the last bit, on either side.

    Args:
        ours: The scores of experthub.
        theirs: The scores of lm-eval, in the same order.

    Returns:
        The counts and the largest difference.
    """
    pairs = list(zip(ours, theirs, strict=True))
    found: dict[str, Any] = {
        "examples": len(pairs),
        "other_ids": sum(a.ids != b.ids for a, b in pairs),
        "max_abs_difference_of_sums": max(
            abs(x - y) for a, b in pairs for x, y in zip(a.sums, b.sums, strict=True)
        ),
    }
    for measure in ("sums", "means"):
        values = [(getattr(a, measure), getattr(b, measure)) for a, b in pairs]
        margins = [(margin(a), margin(b)) for a, b in values]
        found[measure] = {
            "other_decisions": sum(best(a) != best(b) for a, b in values),
            "ties": sum(0.0 in pair for pair in margins),
            "smallest_margin": min(min(pair) for pair in margins),
        }
    return found


def questions_of(reference: str) -> list[Question]:
    """Read the first examples of a task, in the order of their ids."""
    task = read_task(reference)
    return [
        Question(
            task.format_prompt(example),
            tuple(task.list_choices(example)),
            task.find_answer(example) or 0,
        )
        for example in task.split("all", EXAMPLES)
    ]


def tune(peer: LmEval, name: str) -> dict[int, float]:
    """Time lm-eval on the first examples of a task for each batch size, the better of two passes."""
    passes = [{batch: peer.seconds(name, batch, TUNED) for batch in BATCHES} for _ in range(2)]
    taken = {batch: min(seconds[batch] for seconds in passes) for batch in BATCHES}
    print(f"lm-eval, {name}, seconds by batch size:", taken, file=sys.stderr)
    return taken


def rates(seconds: Sequence[float], examples: int) -> str:
    """Format the examples per second: median, smallest and largest."""
    found = [examples / s for s in seconds]
    return f"{median(found):7.2f} ({min(found):.2f} to {max(found):.2f})"


def row(name: str, examples: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Print one row of the table, and return its numbers."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    spread = f"{median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:42} {rates(ours, examples):26} {rates(theirs, examples):26} {spread}")
    return {
        "examples": examples,
        "examples_per_second": median(examples / s for s in ours),
        "lm_eval_examples_per_second": median(examples / s for s in theirs),
        "ratio": median(ratios),
        "ratio_smallest_and_largest": [min(ratios), max(ratios)],
    }


def report(asked: dict[str, list[Question]], times: Times) -> dict[str, Any]:
    """Print the table of speeds, by task and for all tasks, and return its numbers."""
    print(f"{'examples/s, median (smallest to largest)':42} {'experthub':26} {'lm-eval':26} ratio")
    found = {}
    for reference, questions in asked.items():
        ours, theirs = times[f"{reference}, experthub"], times[f"{reference}, lm-eval"]
        found[reference] = row(reference, len(questions), ours, theirs)
    total = sum(map(len, asked.values()))
    sides = [
        [sum(ts) for ts in zip(*(times[f"{name}, {side}"] for name in asked), strict=True)]
        for side in ("experthub", "lm-eval")
    ]
    found["all"] = row("all", total, *sides)
    print(f"target: at least {TARGET} times lm-eval's examples per second over all tasks")
    return found


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__)
    torch.set_num_threads(THREADS)
    found = find(BASE, Session())
    asked = {reference: questions_of(reference) for reference in TASKS}
    tokenizer, model = load_tokenizer(found), load_model(found, "float32", "cpu")
    agreement, tuned = {}, {}
    cases: dict[str, Callable[[], float]] = {}
    with TemporaryDirectory() as folder:
        peer = LmEval(options.cache, found.folder, Path(folder))
        around = surroundings(peer.versions)
        for reference, questions in asked.items():
            name = reference.rpartition(":")[2].replace("/", "_")
            theirs = peer.score(name, questions)
            agreement[reference] = compare(score(model, tokenizer, questions), theirs)
            tuned[reference] = tune(peer, name)
            batch = min(tuned[reference], key=tuned[reference].__getitem__)
            cases[f"{reference}, experthub"] = timed(partial(score, model, tokenizer, questions))
            cases[f"{reference}, lm-eval"] = partial(peer.seconds, name, batch, EXAMPLES)
        times = run_rounds(cases, options.rounds)
        peer.close()
    speeds = report(asked, times)
    for reference, numbers in agreement.items():
        print(f"{reference}: {json.dumps(numbers)}")
    result = {
        "benchmark": "evaluate",
        "surroundings": around,
        "seconds": times,
        "speeds": speeds,
        "lm_eval_seconds_by_batch_size": tuned,
        "agreement": agreement,
        "target": TARGET,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
