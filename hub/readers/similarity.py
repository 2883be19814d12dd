"""Labels scored by a sentence encoder: the cosine between a text and each label's own text.

The labels' embeddings are the base's, frozen, as CLIP makes heads of class names (Radford et al.,
https://arxiv.org/abs/2103.00020, section 3.1.2); an expert changes how the input is read.

Shapes: B texts, T tokens, D features, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Example, Task
from torch import Tensor

SCALE = 20.0  # of the cosine, as sentence-transformers trains with
MAX_TOKENS = 256
BATCH = 32


class Similarity:
    """Scores choices by `20 cos(embedding of the input, the base's embedding of the choice)`."""

    name = "label-cosine"

    def __init__(self, base: Callable[[], Any], tokenizer: Any) -> None:
        """base: gives the encoder that makes the heads, whatever model reads the inputs."""
        self.base, self.tokenizer = base, tokenizer
        self._heads: dict[str, Tensor] = {}

    def question(self, task: Task, example: Example) -> Question:
        return Question(example.input, tuple(task.choices(example)))

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        texts_BD = embedded(model, self.tokenizer, [q.text for q in questions])
        found = []
        for text_D, question in zip(texts_BD, questions, strict=True):
            values = (SCALE * self.heads(question.choices) @ text_D).tolist()
            found.append(Scores(tuple(values), (1,) * len(values)))
        return found

    def heads(self, choices: Sequence[str]) -> Tensor:
        """The choices' embeddings `[C, D]`, each made once."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self._heads]
        if new:
            self._heads |= dict(zip(new, embedded(self.base(), self.tokenizer, new), strict=True))
        return torch.stack([self._heads[choice] for choice in choices])


@torch.no_grad()
def embedded(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit embeddings `[B, D]` of texts; like lengths share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in part],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(next(model.parameters()).device)
        for i, row in zip(part, pooled(model, batch), strict=True):
            rows[i] = row
    return torch.stack(rows)


def pooled(model: Any, batch: Any) -> Tensor:
    """The mean of the last hidden states of real tokens, of length 1, `[B, D]`, float32."""
    hidden_BTD = model(**batch).last_hidden_state.float()
    mask_BT1 = batch["attention_mask"][..., None].float()
    mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=-1)
