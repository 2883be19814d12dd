"""The interface of all readers, and the batching that they share.

Shapes: N inputs, T tokens, C choices, L labels of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

BATCH_TOKENS = 4096  # Tokens of a batch, with padding; an image counts as one token.


class Row(Protocol):
    """One input in the form that a model reads."""

    @property
    def size(self) -> int:
        """The number of tokens; inputs of similar size share a batch."""
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
        choices = tuple(self.separator + choice for choice in task.list_choices(example))
        return Question(task.format_prompt(example), choices)


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


class ReaderScorer:
    """A scorer that uses the logits of a reader, without gradients."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.name = reader, reader.name

    def question(self, task: Task, example: Example) -> Question:
        """Build the question of an example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The question of the reader.
        """
        return self.reader.question(task, example)

    @torch.no_grad()
    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The model to evaluate.
            questions: The questions.

        Returns:
            The logits of every question's choices; each choice counts as one token.
        """
        rows = [self.reader.row(question) for question in questions]
        counts = [len(question.choices) for question in questions]
        logits_NC = read_all(self.reader, model, rows, max(counts))
        return [
            Scores(tuple(values[:count]), (1,) * count)
            for values, count in zip(logits_NC.tolist(), counts, strict=True)
        ]


def read_all(reader: Reader, model: Any, rows: Sequence[Row], width: int | None = None) -> Tensor:
    """Compute the logits of any number of inputs; inputs of similar size share a batch.

    Args:
        reader: The reader.
        model: The model.
        rows: The prepared questions.
        width: The largest number of choices; None if all batches have the same number.

    Returns:
        Logits `[N, width]` in the order of the rows, on the device of the model.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].size)
    parts = []
    for batch in _batches(order, rows):
        with explain_forward_errors(model):
            logits_NC = reader.read(model, [rows[i] for i in batch])
        missing = 0 if width is None else width - logits_NC.shape[1]
        parts.append(torch.nn.functional.pad(logits_NC, (0, missing), value=float("-inf")))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    return torch.cat(parts)[back]


def _batches(order: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
    """Group inputs by size into batches of at most `BATCH_TOKENS` tokens with padding."""
    batch: list[int] = []
    for index in order:
        if batch and rows[index].size * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


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
