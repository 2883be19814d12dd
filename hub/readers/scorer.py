"""Scorers: a score for every choice of a question, from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args

from experthub.hub.files.spelling import check_choice
from experthub.hub.tasks.task import Example, Task

Measure = Literal["mean", "sum", "byte"]
Long = Literal["cut", "refuse"]


def parse_measure(text: str) -> Measure:
    """Check the name of a measure.

    Args:
        text: The name.

    Returns:
        The same name.

    Raises:
        UsageError: There is no such measure.
    """
    check_choice(text, get_args(Measure), "score")
    return cast(Measure, text)


def parse_long(text: str) -> Long:
    """Check the name of a rule for texts with more tokens than a base can read.

    Args:
        text: The name.

    Returns:
        The same name.

    Raises:
        UsageError: There is no such rule.
    """
    check_choice(text, get_args(Long), "rule for long texts")
    return cast(Long, text)


@dataclass(frozen=True)
class Question:
    """An example in the form that a model reads: its text, and the possible answers."""

    text: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """The values of a question's choices, and the number of tokens of each choice."""

    values: tuple[float, ...]
    tokens: tuple[int, ...]

    def by(self, measure: Measure, choices: Sequence[str]) -> list[float]:
        """Normalise the values by a measure.

        Args:
            measure: `sum` keeps the values, `mean` divides them by the number of tokens, and `byte`
                divides them by the number of UTF-8 bytes of the choice.
            choices: The texts of the choices.

        Returns:
            One score for every choice.
        """
        if measure == "sum":
            return list(self.values)
        if measure == "mean":
            return [value / n for value, n in zip(self.values, self.tokens, strict=True)]
        sizes = [max(1, len(choice.encode())) for choice in choices]
        return [value / n for value, n in zip(self.values, sizes, strict=True)]


class Scorer(Protocol):
    """A way to score the choices of questions."""

    @property
    def name(self) -> str:
        """The name of the values, for the protocol and the cache."""
        ...

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The text to read and the choices to score.
        """
        ...

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The model to evaluate.
            questions: The questions, which are scored together.

        Returns:
            The scores of every question, which depend on the model and on these questions only.
        """
        ...
