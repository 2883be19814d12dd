"""Tasks: examples with their right answers, assigned to splits by their content."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, cast, get_args

from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.digests import canonical_json, digest_of
from experthub.hub.files.safe_text import WORD
from experthub.hub.files.spelling import check_choice
from experthub.hub.files.yaml_files import Closed
from pydantic import Field, field_validator, model_validator

Split = Literal["train", "validation", "test", "all"]
CHOICE = "\n  choice: "


class Card(Closed):
    """The description of a task: card.yaml.

    Attributes:
        name: The name of the task within its suite: words as in names of experts, upper case
            allowed, joined by `/`.
        source: The dataset that the task is made from.
        license: The licence of the dataset.
        category: A word that describes the task.
        kind: The kind of answers.
        metric: The name of the metric.
        template: The prompt, with `{input}` and, to list the answers, `{choices}`.
        labels: The answers, if they are the same for every example.
    """

    name: str
    source: str
    license: str | None = None
    category: str | None = None
    kind: Literal["choices", "generation", "labels"] = "choices"
    metric: str = "accuracy"
    template: str = "{input}\nAnswer:"
    labels: list[str] | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        """Reject a name that a path, a shell or a terminal would interpret."""
        if not re.fullmatch(rf"{WORD}(/{WORD})*", name):
            raise ValueError(
                f"{name[:100]!r} is not a name of a task; use letters, digits, '.', '_' and '-', "
                "and '/' between parts"
            )
        return name

    @model_validator(mode="after")
    def _check_template(self) -> Card:
        """Reject a template without a place for the input."""
        if "{input}" not in self.template:
            raise ValueError("the template does not contain {input}")
        return self


class Example(Closed):
    """One line of examples.jsonl, with either `choices` and `answer`, or `targets`.

    Attributes:
        id: 16 hexadecimal digits, see `example_id`.
        input: The text, or an image in base64.
        choices: The possible answers.
        answer: The position of the right answer in `choices`.
        targets: The accepted answers, if there are no choices.
    """

    id: str
    input: str
    choices: Annotated[list[str], Field(min_length=2)] | None = None
    answer: Annotated[int, Field(ge=0)] | None = None
    targets: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_answer(self) -> Example:
        """Reject an example without exactly one kind of answer."""
        if (self.choices is None) == (self.targets is None):
            raise ValueError("expected either choices with an answer, or targets")
        if self.choices is not None and self.answer is None:
            raise ValueError("there are choices, but no answer")
        if self.choices is not None and (self.answer or 0) >= len(self.choices):
            raise ValueError(
                f"the answer is {self.answer}, and the positions of the {len(self.choices)} "
                f"choices are 0 to {len(self.choices) - 1}"
            )
        return self

    @property
    def part(self) -> Split:
        """The split that this example belongs to."""
        place = int(self.id, 16) % 100
        return "train" if place < 70 else "validation" if place < 85 else "test"


def example_id(text: str, choices: Iterable[str]) -> str:
    """Compute the id of an example from its content, so that equal examples share a split.

    Args:
        text: The example's input.
        choices: The example's choices.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(canonical_json([text, *choices])).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """A task with its examples.

    Args:
        reference: `suite:name`, or the folder of the task.
        card: The description.
        examples: The examples, sorted by id.
    """

    reference: str
    card: Card
    examples: tuple[Example, ...]

    @property
    def digest(self) -> str:
        """The digest of the card and the examples."""
        return digest_of(
            [self.card.model_dump(mode="json"), [e.model_dump(mode="json") for e in self.examples]]
        )

    def split(self, name: Split, limit: int | None = None) -> list[Example]:
        """Return the examples of a split.

        Args:
            name: The name of the split.
            limit: The largest number of examples; the first ones by id are used. None means all.

        Returns:
            The examples, sorted by id.

        Raises:
            HubError: The split has no examples.
        """
        chosen = [e for e in self.examples if name in ("all", e.part)]
        if not chosen:
            counts = Counter(example.part for example in self.examples)
            there = ", ".join(f"{count} {part}" for part, count in counts.items())
            raise HubError(
                f"task {self.reference} has no {name} examples; "
                f"it has {len(self.examples)} in all: {there}",
                "use another split, or add examples to the task",
            )
        return chosen[:limit]

    def format_prompt(self, example: Example) -> str:
        """Fill an example into the template.

        Args:
            example: An example of this task.

        Returns:
            The text before the answer.
        """
        listed = "".join(CHOICE + choice for choice in example.choices or ())
        template = self.card.template.replace("{choices}", "\0")
        return template.replace("{input}", example.input).replace("\0", listed)

    @property
    def has_choices(self) -> bool:
        """True if every example has choices that can be ranked, its own or the card's labels."""
        return all(self.list_choices(e) and self.find_answer(e) is not None for e in self.examples)

    def list_choices(self, example: Example) -> list[str]:
        """Return the possible answers of an example.

        Args:
            example: An example of this task.

        Returns:
            The example's choices, or else the card's labels; an empty list if there are none.
        """
        return example.choices or self.card.labels or []

    def find_answer(self, example: Example) -> int | None:
        """Find the right answer among the choices of an example.

        Args:
            example: An example of this task.

        Returns:
            The position of the right answer; None if it is not among the choices.
        """
        if example.choices is not None:
            return example.answer
        labels, targets = self.card.labels or [], example.targets or []
        return labels.index(targets[0]) if targets and targets[0] in labels else None

    def require_answer(self, example: Example) -> int:
        """Find the right answer among the choices of an example, which must be there.

        Args:
            example: An example of this task.

        Returns:
            The position of the right answer.

        Raises:
            UsageError: The example has no choices, or its answer is not among them.
        """
        answer = self.find_answer(example)
        if answer is None:
            raise UsageError(
                f"task {self.reference}: example {example.id} has no choices, or its answer is not "
                "among them",
                "choose a task whose examples have choices",
            )
        return answer

    def format_answer(self, example: Example) -> str:
        """Format the right answer as the text that follows the prompt.

        Args:
            example: An example of this task.

        Returns:
            A space and the right answer.
        """
        if example.choices is not None and example.answer is not None:
            return " " + example.choices[example.answer]
        return " " + (example.targets or [""])[0]


@dataclass(frozen=True)
class Chosen:
    """A task with some of its examples.

    Args:
        task: The task.
        examples: The chosen examples.
    """

    task: Task
    examples: tuple[Example, ...]

    @property
    def labels(self) -> list[int]:
        """The positions of the right answers among the choices."""
        return [self.task.require_answer(example) for example in self.examples]


def parse_split(text: str) -> Split:
    """Check the name of a split.

    Args:
        text: The name.

    Returns:
        The same name.

    Raises:
        UsageError: There is no such split.
    """
    check_choice(text, get_args(Split), "split")
    return cast(Split, text)
