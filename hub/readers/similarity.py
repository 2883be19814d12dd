"""Scores of labels by a sentence encoder: the cosine between a text and each label's text.

The frozen base embeds the labels, as CLIP makes heads from class names (Radford et al.,
https://arxiv.org/abs/2103.00020, section 3.1.2). An expert changes only the embedding of the input.

Shapes: B texts, T tokens, D features, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.hub.readers.reader import HeadCache, ReadsInput
from experthub.hub.readers.scorer import Question, Scores
from torch import Tensor

SCALE = 20.0  # Factor of the cosine, as in the training of sentence-transformers.
MAX_TOKENS = 256
BATCH = 32
# A tokenizer stores how it cuts and pads, and fails if another thread reads a text at that moment.
_tokenising = Lock()


class Similarity(ReadsInput):
    """A scorer by `20 cos(embedding of the input, the base's embedding of the choice)`."""

    name = "label-cosine"

    def __init__(self, base: Callable[[], Any], tokenizer: Any) -> None:
        """Create a scorer.

        Args:
            base: A function that returns the encoder that embeds the choices, whichever model reads
                the inputs.
            tokenizer: The tokenizer of the base.
        """
        self.tokenizer = tokenizer
        self.heads = HeadCache(lambda choices: embed(base(), tokenizer, choices))

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The encoder that reads the inputs.
            questions: The questions.

        Returns:
            The scaled cosines of every question's choices; each choice counts as one token.
        """
        texts_BD = embed(model, self.tokenizer, [q.text for q in questions])
        found = []
        for text_D, question in zip(texts_BD, questions, strict=True):
            values = (SCALE * self.heads(question.choices) @ text_D).tolist()
            found.append(Scores(tuple(values), (1,) * len(values)))
        return found


def tokenise(
    tokenizer: Any, text: str, whole: bool = False, add_special_tokens: bool = True
) -> tuple[int, ...]:
    """Tokenise a text.

    Args:
        tokenizer: The tokenizer of the base.
        text: The text.
        whole: Whether all tokens are kept, as for a causal language model. Otherwise only the first
            `MAX_TOKENS` are.
        add_special_tokens: Whether the tokenizer adds its special tokens.

    Returns:
        The token ids.
    """
    limit = {} if whole else {"truncation": True, "max_length": MAX_TOKENS}
    with _tokenising:
        return tuple(tokenizer(text, add_special_tokens=add_special_tokens, **limit)["input_ids"])


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Embed texts; texts of similar length share a batch.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        texts: The texts, of which at most `MAX_TOKENS` tokens are read.

    Returns:
        The unit embeddings `[B, D]`, float32.

    Raises:
        UsageError: A text has no tokens.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        with _tokenising:
            batch = tokenizer(
                [texts[i] for i in part],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(next(model.parameters()).device)
        if not batch["input_ids"].numel():
            raise UsageError(f"a text has no tokens: {texts[part[0]][:80]!r}", "write some text")
        for i, row in zip(part, pool(model, batch), strict=True):
            rows[i] = row
    return torch.stack(rows)


def pool(model: Any, batch: Any) -> Tensor:
    """Average the last hidden states over all tokens except padding.

    Args:
        model: The encoder.
        batch: Its inputs, with `attention_mask`.

    Returns:
        The means, normalised to length 1, `[B, D]`, float32.
    """
    hidden_BTD = model(**batch).last_hidden_state.float()
    mask_BT1 = batch["attention_mask"][..., None].float()
    mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean_BD, dim=-1)
