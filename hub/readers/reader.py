"""The interface of all readers, and what they share.

Shapes: N inputs, T tokens, C choices, L labels of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from experthub.hub.errors import UsageError
from experthub.hub.readers.scorer import Question
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

IMAGES = ("data:image/", "iVBORw0KGgo", "/9j/")  # The first characters of PNG and JPEG in base64.


class Row(Protocol):
    """One input in the form that a model reads."""

    @property
    def size(self) -> int:
        """The number of tokens; inputs of similar size share a batch."""
        ...

    @property
    def answers(self) -> int:
        """The number of tokens of all choices that the model reads; 0 if it reads none."""
        ...

    def vary(self, seed: int) -> Row:
        """Make a random variation of the input that does not change the right answer.

        Args:
            seed: The seed of the variation.

        Returns:
            The variation.
        """
        ...


class Reader(Protocol):
    """A way to compute logits over the choices of questions with one kind of base.

    Attributes:
        name: The name of the logits.
        real: The mask `[N, T]` of the batch that the model is reading, which is false for padding.
            None if the batch has no padding.
    """

    name: str
    real: Tensor | None

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The text to read and the choices.
        """
        ...

    def row(self, question: Question) -> Any:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The input in the form that `read` takes.
        """
        ...

    def read(self, model: Any, rows: Sequence[Any]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The model, which may compute gradients.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, minus infinity where a question has fewer than C choices.
        """
        ...


class ReadsInput:
    """A part of the readers that read the input of an example as it is, without a prompt."""

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The example's input and the task's choices.
        """
        return Question(example.input, tuple(task.list_choices(example)))


class ReadsPrompt:
    """A part of the readers that read the prompt of a task.

    Attributes:
        separator: The text between the prompt and a choice.
    """

    separator = ""

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The prompt, and the choices after the separator.
        """
        refuse_image(example.input)
        choices = tuple(self.separator + choice for choice in task.list_choices(example))
        return Question(task.format_prompt(example), choices)


def refuse_image(text: str) -> None:
    """Refuse an image where a text is read: its base64 would be read as words.

    Args:
        text: The input of an example.

    Raises:
        UsageError: It is a PNG or JPEG in base64.
    """
    if text.startswith(IMAGES) and len(text) > 64 and not any(map(str.isspace, text[:64])):
        raise UsageError(
            f"the input {text[:24]!r}... is an image, and a language model is given text alone, "
            "even one that can read images",
            "use a task of texts for this base, or CLIP, SigLIP or an image classifier for images",
        )


class HeadCache:
    """Embeddings of choices, which are computed once.

    Args:
        embed: A function from different choices to their embeddings `[C, D]`.
    """

    def __init__(self, embed: Callable[[list[str]], Tensor]) -> None:
        self.embed = embed
        self._known: dict[str, Tensor] = {}

    def __call__(self, choices: Sequence[str]) -> Tensor:
        """Return the embeddings `[C, D]` of choices."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self._known]
        if new:
            self._known |= dict(zip(new, self.embed(new), strict=True))
        return torch.stack([self._known[choice] for choice in choices])


def split_by_row(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Arrange the values of the choices of all inputs by input.

    Args:
        values: One value for each choice, input after input.
        counts: The number of choices of each input.

    Returns:
        The values `[N, C]`, padded with minus infinity.
    """
    parts = torch.split(values, list(counts))
    return torch.nn.utils.rnn.pad_sequence(
        list(parts), batch_first=True, padding_value=float("-inf")
    )


def select_columns(logits_NL: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """Select the logits of each input's own labels.

    Args:
        logits_NL: The logits of all labels.
        columns: The positions of each input's labels.

    Returns:
        The logits `[N, C]`, padded with minus infinity.
    """
    counts, device = [len(own) for own in columns], logits_NL.device
    chosen = torch.tensor([column for own in columns for column in own], device=device)
    return split_by_row(logits_NL[repeat_rows(counts, device), chosen], counts)


def compare_with_heads(
    features_ND: Tensor, heads: Sequence[Tensor], scale: float | Tensor
) -> Tensor:
    """Multiply the features of each input with the embeddings of its own choices.

    Args:
        features_ND: The features.
        heads: The embeddings `[C, D]` of each input's choices.
        scale: The factor of the products.

    Returns:
        The products `[N, C]`, padded with minus infinity.
    """
    counts = [len(own) for own in heads]
    owners = repeat_rows(counts, features_ND.device)
    products = torch.cat(list(heads)).to(features_ND) * features_ND[owners]
    return split_by_row(scale * products.sum(1), counts)


def repeat_rows(counts: Sequence[int], device: Any) -> Tensor:
    """Repeat the position of each input for each of its choices.

    Args:
        counts: The number of choices of each input.
        device: The device of the result.

    Returns:
        The position of the input that each choice belongs to.
    """
    return torch.tensor([row for row, n in enumerate(counts) for _ in range(n)], device=device)


def find_pad_token(model: Any) -> int | None:
    """Find the token that a model takes for padding.

    Some models find the end of a text by it, or count positions by it.

    Args:
        model: The model.

    Returns:
        The token id; None if the configuration names none.
    """
    found: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found


def pad(
    rows: Sequence[Sequence[int]], device: Any, left: bool = False, token: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pad token ids.

    Args:
        rows: The token ids of each text.
        device: The device of the result.
        left: Whether padding comes before the tokens.
        token: The token id of padding, see `find_pad_token`. None and -1 mean 0.

    Returns:
        The token ids `[N, T]`, and a mask `[N, T]` that is false for padding.
    """
    width, filler = max(map(len, rows)), max(0, token or 0)
    filled = [([filler] * (width - len(row)), row) for row in rows]
    ids = [[*fill, *row] if left else [*row, *fill] for fill, row in filled]
    lengths_N1 = torch.tensor([[len(row)] for row in rows], device=device)
    places_T = torch.arange(width, device=device)
    real_NT = places_T >= width - lengths_N1 if left else places_T < lengths_N1
    return torch.tensor(ids, dtype=torch.long, device=device), real_NT
