"""Scores of labels by a sentence encoder: the cosine between a text and each label's text.

The frozen base embeds the labels, as CLIP makes heads from class names (Radford et al.,
https://arxiv.org/abs/2103.00020, section 3.1.2). An expert changes only the embedding of the input.

Shapes: B texts, T tokens, D features, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.reader import HeadCache, ReadsInput, find_pad_token, pad
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.readers.tokens import tokenise
from experthub.hub.readers.window import Window
from torch import Tensor

SCALE = 20.0  # Factor of the cosine, as in the training of sentence-transformers.
BATCH = 32


class Similarity(ReadsInput):
    """A scorer by `20 cos(embedding of the input, the base's embedding of the choice)`."""

    name = "label-cosine"

    def __init__(
        self, base: Callable[[], Any], tokenizer: Any, window: Window | None = None
    ) -> None:
        """Create a scorer.

        Args:
            base: A function that returns the encoder that embeds the choices, whichever model reads
                the inputs.
            tokenizer: The tokenizer of the base.
            window: The window of the base; None keeps all tokens.
        """
        self.tokenizer, self.window = tokenizer, window
        self.heads = HeadCache(lambda choices: embed(base(), tokenizer, choices, window))

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The encoder that reads the inputs.
            questions: The questions.

        Returns:
            The scaled cosines of every question's choices; each choice counts as one token.
        """
        texts_BD = embed(model, self.tokenizer, [q.text for q in questions], self.window)
        found = []
        for text_D, question in zip(texts_BD, questions, strict=True):
            values = (SCALE * self.heads(question.choices) @ text_D).tolist()
            found.append(Scores(tuple(values), (1,) * len(values)))
        return found


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], window: Window | None = None) -> Tensor:
    """Embed texts; texts of similar length share a batch.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        texts: The texts.
        window: The window of the encoder, to which texts are cut. None keeps all tokens.

    Returns:
        The unit embeddings `[B, D]`, float32.

    Raises:
        UsageError: A text has no tokens, or does not fit and the window refuses such texts.
    """
    ids = [tokenise(tokenizer, text, window) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    device, token = next(model.parameters()).device, find_pad_token(model)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        if not any(ids[i] for i in part):
            raise UsageError(f"a text has no tokens: {texts[part[0]][:80]!r}", "write some text")
        ids_BT, real_BT = pad([ids[i] for i in part], device, token=token)
        batch = {"input_ids": ids_BT, "attention_mask": real_BT.long()}
        with explain_forward_errors(model):
            found_BD = pool(model, batch)
        for i, row in zip(part, found_BD, strict=True):
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
