"""Readers of text: language models, sentence encoders and classifiers.

Shapes: N inputs, T tokens, C choices, D features, L labels of a classifier.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.hub.readers.logprobs import sum_logprobs
from experthub.hub.readers.reader import (
    ReadsInput,
    ReadsPrompt,
    compare_with_heads,
    find_pad_token,
    pad,
    repeat_rows,
    select_columns,
    split_by_row,
)
from experthub.hub.readers.rotary import find_rotary_limit
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.similarity import SCALE, Similarity
from experthub.hub.readers.tokens import Encoded, encode, tokenise
from experthub.hub.readers.window import Window
from torch import Tensor

DROPPED = 0.15  # The share of tokens that a variation of a text omits.


@dataclass(frozen=True)
class TokenRow:
    """A text as token ids, with its choices in the form of its reader.

    Args:
        tokens: The token ids of the text.
        choices: The choices.
        answers: The number of tokens of all choices, if the model reads them.
    """

    tokens: tuple[int, ...]
    choices: Any
    answers: int = 0

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def vary(self, seed: int) -> TokenRow:
        """Omit some tokens at random; keep the first and the last.

        Args:
            seed: The seed of the variation.

        Returns:
            The shorter text.
        """
        kept = random.Random(f"{seed} {self.tokens}")
        inner = [token for token in self.tokens[1:-1] if kept.random() >= DROPPED]
        return replace(self, tokens=(*self.tokens[:1], *inner, *self.tokens[1:][-1:]))


class LanguageModel(ReadsPrompt):
    """A reader for causal models: the mean log-probability of each choice's tokens."""

    name = "mean-logprob"
    separator = " "

    def __init__(self, tokenizer: Any, window: Window | None = None) -> None:
        self.tokenizer, self.window = tokenizer, window
        self.real: Tensor | None = None

    def row(self, question: Question) -> TokenRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The token ids of the prompt and of the choices.
        """
        encoded = encode(self.tokenizer, question.text, question.choices, self.window)
        answers = sum(len(choice) for item in encoded for choice in item.choices)
        return TokenRow(encoded[0].prompt, encoded, answers)

    def read(self, model: Any, rows: Sequence[TokenRow]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The causal model.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: mean log-probabilities.
        """
        items = [item for row in rows for item in self._items(row)]
        sums = sum_logprobs(model, items, self._set_mask)
        self.real = None
        lengths = torch.tensor([len(c) for item in items for c in item.choices])
        counts = [sum(len(item.choices) for item in row.choices) for row in rows]
        return split_by_row(sums / lengths.to(sums.device), counts)

    def _items(self, row: TokenRow) -> list[Encoded]:
        """Use the row's own tokens as prompt, unless choices merge with the end of the prompt."""
        if len(row.choices) > 1:
            return list(row.choices)
        return [Encoded(row.tokens, row.choices[0].choices)]

    def _set_mask(self, real_NT: Tensor) -> None:
        """Set the mask of the batch that the model is about to read."""
        self.real = real_NT


class Seq2Seq(ReadsPrompt):
    """A reader for encoder-decoder models: the mean log-probability of each choice's tokens."""

    name = "mean-logprob"

    def __init__(self, tokenizer: Any, window: Window | None = None) -> None:
        self.tokenizer, self.window = tokenizer, window
        self.real: Tensor | None = None

    def row(self, question: Question) -> TokenRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The token ids of the prompt and of the choices.
        """
        choices = tuple(tokenise(self.tokenizer, choice) for choice in question.choices)
        longest, window = max(map(len, choices)), self.window
        if window is not None and window.size is not None and longest > window.size:
            window.refuse(f"a choice has {longest} tokens", "use a task with shorter choices")
        text = tokenise(self.tokenizer, question.text, window)
        return TokenRow(text, choices, sum(map(len, choices)))

    def read(self, model: Any, rows: Sequence[TokenRow]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The encoder-decoder model.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: mean log-probabilities.
        """
        device, token = next(model.parameters()).device, find_pad_token(model)
        ids_NT, self.real = pad([row.tokens for row in rows], device, token=token)
        counts = [len(row.choices) for row in rows]
        owner = repeat_rows(counts, device)
        mask_NT = self.real.long()
        hidden_NTD = model.get_encoder()(
            input_ids=ids_NT, attention_mask=mask_NT
        ).last_hidden_state[owner]
        choices = [choice for row in rows for choice in row.choices]
        answers, real = pad(choices, device, token=token)
        start = answers.new_full((len(answers), 1), model.config.decoder_start_token_id)
        self.real = real
        logits = model(
            encoder_outputs=(hidden_NTD,),
            attention_mask=mask_NT[owner],
            decoder_input_ids=torch.cat([start, answers[:, :-1]], 1),
        ).logits
        self.real = None
        log = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        return split_by_row((log * real).sum(1) / real.sum(1), counts)


class Encoder(ReadsInput):
    """A reader for encoders: the scaled cosines with the frozen embeddings of the choices."""

    name = Similarity.name

    def __init__(self, similarity: Similarity) -> None:
        self.similarity = similarity
        self.real: Tensor | None = None

    def row(self, question: Question) -> TokenRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The token ids of the input, and the embeddings of the choices.
        """
        tokens = self.similarity.tokenise(question.text)
        return TokenRow(tokens, self.similarity.heads(question.choices))

    def read(self, model: Any, rows: Sequence[TokenRow]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The encoder.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: scaled cosines.
        """
        device, token = next(model.parameters()).device, find_pad_token(model)
        ids_NT, self.real = pad([row.tokens for row in rows], device, token=token)
        text_ND = self.similarity.pool(model, ids_NT, self.real)
        self.real = None
        return compare_with_heads(text_ND, [row.choices for row in rows], SCALE)


class TextClassifier(ReadsInput):
    """A reader for text classifiers: the outputs of the frozen head for a question's choices."""

    name = "classifier-logits"

    def __init__(
        self, tokenizer: Any, labels: dict[str, int], window: Window | None = None
    ) -> None:
        self.tokenizer, self.labels, self.window = tokenizer, labels, window
        self.real: Tensor | None = None

    def row(self, question: Question) -> TokenRow:
        """Prepare a question for the model.

        Args:
            question: The question.

        Returns:
            The token ids of the input, and the outputs of the choices.
        """
        tokens = tokenise(self.tokenizer, question.text, self.window)
        return TokenRow(tokens, find_columns(question.choices, self.labels))

    def read(self, model: Any, rows: Sequence[TokenRow]) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The classifier.
            rows: The prepared questions.

        Returns:
            Logits `[N, C]`, float32: its outputs.
        """
        device, token = next(model.parameters()).device, find_pad_token(model)
        parts: list[Tensor] = [torch.empty(0)] * len(rows)
        for group in _group_texts(model.config, token, [row.tokens for row in rows]):
            ids_NT, self.real = pad([rows[i].tokens for i in group], device, token=token)
            found = model(input_ids=ids_NT, attention_mask=self.real.long()).logits.float()
            for i, logits_L in zip(group, found, strict=True):
                parts[i] = logits_L
        self.real = None
        return select_columns(torch.stack(parts), [row.choices for row in rows])


def _group_texts(
    config: Any, token: int | None, texts: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Group the texts that a classifier can read in one batch.

    A decoder takes its decision at the last token that is not padding; without a padding token it
    reads one text at a time. An encoder-decoder takes it at the last EOS, and all texts of a batch
    need the same number of them. Rotary positions may depend on the longest text.
    """
    if token is None:
        return [[i] for i in range(len(texts))]
    limit = find_rotary_limit(config)
    alone = limit is not None and max(map(len, texts)) > limit
    groups: dict[Any, list[int]] = {}
    for i, text in enumerate(texts):
        counted = config.is_encoder_decoder and config.eos_token_id
        key = text.count(counted) if counted else 0
        groups.setdefault((key, len(text) if alone or counted == token else 0), []).append(i)
    return list(groups.values())


def find_columns(choices: Sequence[str], labels: dict[str, int]) -> tuple[int, ...]:
    """Find the outputs of a classifier that belong to choices.

    Args:
        choices: The choices.
        labels: The output of each label.

    Returns:
        The output of each choice.

    Raises:
        UsageError: A choice is not a label of the classifier.
    """
    missing = [choice for choice in choices if choice not in labels]
    if missing:
        raise UsageError(
            f"the base has no label {missing[0]!r}; it has {', '.join(sorted(labels)[:8])}",
            "use a task whose choices are labels of the base",
        )
    return tuple(labels[choice] for choice in choices)
