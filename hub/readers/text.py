"""Readers of text: language models by the likelihood of an answer, encoders, classifiers.

Shapes: N inputs, T tokens, C choices, D features, L labels of a classifier.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.hub.readers.likelihood import Encoded, choice_sums, encode
from experthub.hub.readers.reader import by_row, padded, selected
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.similarity import MAX_TOKENS, SCALE, Similarity, pooled
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

DROPPED = 0.15  # share of tokens that a variation of a text leaves out


@dataclass(frozen=True)
class Text:
    """A text as token ids.  choices: what the logits are over, in the reader's own form."""

    tokens: tuple[int, ...]
    choices: Any

    @property
    def size(self) -> int:
        return len(self.tokens)

    def varied(self, seed: int) -> Text:
        """Without some of its tokens; the first and the last stay."""
        kept = random.Random(f"{seed} {self.tokens}")
        inner = [token for token in self.tokens[1:-1] if kept.random() >= DROPPED]
        return replace(self, tokens=(*self.tokens[:1], *inner, *self.tokens[1:][-1:]))


class LanguageModel:
    """A causal model: the mean log-probability of each choice's tokens after the prompt."""

    name = "mean-logprob"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.real: Tensor | None = None

    def question(self, task: Task, example: Example) -> Question:
        return Question(task.prompt(example), tuple(" " + c for c in task.choices(example)))

    def row(self, question: Question) -> Text:
        encoded = encode(self.tokenizer, question.text, question.choices)
        return Text(encoded[0].prompt, encoded)

    def read(self, model: Any, rows: Sequence[Text]) -> Tensor:
        items = [item for row in rows for item in self._items(row)]
        sums = choice_sums(model, items, self._reading)
        self.real = None
        lengths = torch.tensor([len(c) for item in items for c in item.choices])
        counts = [sum(len(item.choices) for item in row.choices) for row in rows]
        return by_row(sums / lengths.to(sums.device), counts)

    def _items(self, row: Text) -> list[Encoded]:
        """The prompt as it is now, unless choices that merge with its end need prompts of their own."""
        if len(row.choices) > 1:
            return list(row.choices)
        return [Encoded(row.tokens, row.choices[0].choices)]

    def _reading(self, mask: Tensor) -> None:
        self.real = mask.bool()


class Seq2Seq:
    """A model that reads and then writes: the mean log-probability of each choice's tokens."""

    name = "mean-logprob"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.real: Tensor | None = None

    def question(self, task: Task, example: Example) -> Question:
        return Question(task.prompt(example), tuple(task.choices(example)))

    def row(self, question: Question) -> Text:
        ids = self.tokenizer(list(question.choices))["input_ids"]
        return Text(tuple(self.tokenizer(question.text)["input_ids"]), tuple(map(tuple, ids)))

    def read(self, model: Any, rows: Sequence[Text]) -> Tensor:
        device = next(model.parameters()).device
        ids_NT, self.real = padded([row.tokens for row in rows], device)
        counts = [len(row.choices) for row in rows]
        owner = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=device)
        mask_NT = self.real.long()
        hidden_NTD = model.get_encoder()(
            input_ids=ids_NT, attention_mask=mask_NT
        ).last_hidden_state[owner]
        answers, real = padded([choice for row in rows for choice in row.choices], device)
        start = answers.new_full((len(answers), 1), model.config.decoder_start_token_id)
        self.real = real
        logits = model(
            encoder_outputs=(hidden_NTD,),
            attention_mask=mask_NT[owner],
            decoder_input_ids=torch.cat([start, answers[:, :-1]], 1),
        ).logits
        self.real = None
        log = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        return by_row((log * real).sum(1) / real.sum(1), counts)


class Encoder:
    """A sentence encoder: the scaled cosines with the choices' embeddings by the base, frozen."""

    name = Similarity.name

    def __init__(self, similarity: Similarity) -> None:
        self.similarity = similarity
        self.real: Tensor | None = None

    def question(self, task: Task, example: Example) -> Question:
        return self.similarity.question(task, example)

    def row(self, question: Question) -> Text:
        found = self.similarity.tokenizer(question.text, truncation=True, max_length=MAX_TOKENS)
        return Text(tuple(found["input_ids"]), self.similarity.heads(question.choices))

    def read(self, model: Any, rows: Sequence[Text]) -> Tensor:
        device = next(model.parameters()).device
        ids_NT, self.real = padded([row.tokens for row in rows], device)
        text_ND = pooled(model, {"input_ids": ids_NT, "attention_mask": self.real.long()})
        self.real = None
        heads_CD = torch.cat([row.choices for row in rows]).to(text_ND)
        counts = [len(row.choices) for row in rows]
        owner = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=device)
        return by_row(SCALE * (heads_CD * text_ND[owner]).sum(1), counts)


class TextClassifier:
    """A classifier of text: its own frozen head, at the labels that are a question's choices."""

    name = "classifier-logits"

    def __init__(self, tokenizer: Any, labels: dict[str, int]) -> None:
        self.tokenizer, self.labels = tokenizer, labels
        self.real: Tensor | None = None

    def question(self, task: Task, example: Example) -> Question:
        return Question(example.input, tuple(task.choices(example)))

    def row(self, question: Question) -> Text:
        found = self.tokenizer(question.text, truncation=True, max_length=MAX_TOKENS)
        return Text(tuple(found["input_ids"]), columns_of(question.choices, self.labels))

    def read(self, model: Any, rows: Sequence[Text]) -> Tensor:
        ids_NT, self.real = padded([row.tokens for row in rows], next(model.parameters()).device)
        logits_NL = model(input_ids=ids_NT, attention_mask=self.real.long()).logits.float()
        self.real = None
        return selected(logits_NL, [row.choices for row in rows])


def columns_of(choices: Sequence[str], labels: dict[str, int]) -> tuple[int, ...]:
    """Which of a classifier's outputs the choices are; UsageError for one that is none."""
    missing = [choice for choice in choices if choice not in labels]
    if missing:
        raise UsageError(
            f"the base has no label {missing[0]!r}, it has {', '.join(sorted(labels)[:8])}",
            "use a task with the base's own labels",
        )
    return tuple(labels[choice] for choice in choices)
