"""What turns a model and its questions into a score for every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args

from experthub.hub.errors import UsageError
from experthub.hub.tasks.task import Example, Task

Measure = Literal["mean", "sum", "byte"]


def as_measure(text: str) -> Measure:
    """The name of a measure; UsageError for any other."""
    if text not in get_args(Measure):
        raise UsageError(f"unknown score {text!r}", f"use one of {', '.join(get_args(Measure))}")
    return cast(Measure, text)


@dataclass(frozen=True)
class Question:
    """An example as a scorer puts it: the text that a model reads, and what may be the answer."""

    text: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """One value and one number of tokens for every choice of a question."""

    values: tuple[float, ...]
    tokens: tuple[int, ...]

    def by(self, measure: Measure, choices: Sequence[str]) -> list[float]:
        """The values as they are, per token, or per UTF-8 byte of the choice's own text."""
        if measure == "sum":
            return list(self.values)
        if measure == "mean":
            return [value / n for value, n in zip(self.values, self.tokens, strict=True)]
        sizes = [max(1, len(choice.encode())) for choice in choices]
        return [value / n for value, n in zip(self.values, sizes, strict=True)]


class Scorer(Protocol):
    """How choices are scored.  name: of what the values are, for the protocol and the cache."""

    @property
    def name(self) -> str: ...

    def question(self, task: Task, example: Example) -> Question: ...

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """The scores of every question, each a function of the questions given and the model."""
        ...
