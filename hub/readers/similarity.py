"""Scores of labels by a sentence encoder: the cosine between a text and each label's text.

The frozen base embeds the labels, as CLIP makes heads from class names (Radford et al.,
https://arxiv.org/abs/2103.00020, section 3.1.2). An expert changes only the embedding of the input.

Shapes: B texts, T tokens, D features, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.errors import UsageError
from experthub.hub.formats.embedding_rule import EmbeddingRule, read_embedding_rule
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.reader import HeadCache, ReadsInput, find_pad_token, pad
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.readers.tokens import tokenise
from experthub.hub.readers.window import Window
from torch import Tensor

SCALE = 20.0  # Factor of the cosine, as in the training of sentence-transformers.
BATCH = 32
MEAN = EmbeddingRule()


class Similarity(ReadsInput):
    """A scorer by `20 cos(embedding of the input, the base's embedding of the choice)`."""

    name = "label-cosine"

    def __init__(
        self,
        base: Callable[[], Any],
        tokenizer: Any,
        window: Window | None = None,
        rule: EmbeddingRule = MEAN,
    ) -> None:
        """Create a scorer.

        Args:
            base: A function that returns the encoder that embeds the choices, whichever model reads
                the inputs.
            tokenizer: The tokenizer of the base.
            window: The window of the base; None keeps all tokens.
            rule: The rule of the base, see `find_rule`.
        """
        self.tokenizer, self.window, self.rule = tokenizer, window, rule
        self.heads = HeadCache(lambda choices: embed(base(), tokenizer, choices, window, rule))

    def tokenise(self, text: str) -> tuple[int, ...]:
        """Tokenise an input by the rule of the base.

        Args:
            text: The input.

        Returns:
            The token ids.
        """
        return tokenise(self.tokenizer, self.rule.prepare(text), self.window)

    def pool(self, model: Any, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Embed token ids by the rule of the base.

        Args:
            model: The encoder that reads them.
            ids_BT: The token ids.
            real_BT: A mask that is false for padding.

        Returns:
            The unit embeddings `[B, D]`, float32.
        """
        return pool(model, {"input_ids": ids_BT, "attention_mask": real_BT.long()}, self.rule)

    def scores(self, model: Any, questions: Sequence[Question]) -> list[Scores]:
        """Score the choices of questions.

        Args:
            model: The encoder that reads the inputs.
            questions: The questions.

        Returns:
            The scaled cosines of every question's choices; each choice counts as one token.
        """
        texts_BD = embed(model, self.tokenizer, [q.text for q in questions], self.window, self.rule)
        found = []
        for text_D, question in zip(texts_BD, questions, strict=True):
            values = (SCALE * self.heads(question.choices) @ text_D).tolist()
            found.append(Scores(tuple(values), (1,) * len(values)))
        return found


@torch.no_grad()
def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    window: Window | None = None,
    rule: EmbeddingRule = MEAN,
) -> Tensor:
    """Embed texts; texts of similar length share a batch.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        texts: The texts.
        window: The window of the encoder, to which texts are cut. None keeps all tokens.
        rule: The rule of the encoder, see `find_rule`.

    Returns:
        The unit embeddings `[B, D]`, float32.

    Raises:
        UsageError: A text has no tokens, or does not fit and the window refuses such texts.
    """
    ids = [tokenise(tokenizer, rule.prepare(text), window) for text in texts]
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
            found_BD = pool(model, batch, rule)
        for i, row in zip(part, found_BD, strict=True):
            rows[i] = row
    return torch.stack(rows)


def find_rule(base: Base) -> EmbeddingRule:
    """Find the rule by which a sentence encoder makes an embedding.

    Args:
        base: The encoder.

    Returns:
        The rule. That of an encoder without files of sentence-transformers is the mean.

    Raises:
        UsageError: The hub cannot compute the embeddings.
        IntegrityError: A file that states the rule is damaged.
    """
    rule = read_embedding_rule(base.folder)
    if rule.missing:
        raise UsageError(
            f"base {base.name}: modules.json names a pooling, and {base.folder} has no {rule.missing}",
            "copy the file from the source of the encoder, or remove the folder to fetch it again",
        )
    if rule.unknown:
        raise UsageError(
            f"base {base.name}: its files of sentence-transformers make embeddings with "
            f"{rule.unknown}, which the hub does not compute",
            "use an encoder that pools its last hidden states, such as all-minilm-l6-v2",
        )
    return rule


def pool(model: Any, batch: Any, rule: EmbeddingRule = MEAN) -> Tensor:
    """Pool the last hidden states of all tokens except padding.

    Args:
        model: The encoder.
        batch: Its inputs, with `attention_mask`.
        rule: The rule of the encoder. The results of several ways to pool are concatenated.

    Returns:
        The embeddings, normalised to length 1, `[B, D]`, float32. A row without tokens is 0.
    """
    hidden_BTD = model(**batch).last_hidden_state.float()
    mask_BT1 = batch["attention_mask"][..., None].float()
    parts = [_pool_by(mode, hidden_BTD, mask_BT1) for mode in rule.modes]
    found_BD = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    found_BD = found_BD.masked_fill(~mask_BT1.bool().any(1), 0.0)
    return torch.nn.functional.normalize(found_BD, dim=-1)


def _pool_by(mode: str, hidden_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
    """Pool hidden states in one way of sentence-transformers; return `[B, D]`."""
    if mode == "max":
        return hidden_BTD.masked_fill(mask_BT1 == 0, float("-inf")).amax(1)
    if mode in ("cls", "lasttoken"):
        first_B = mask_BT1[..., 0].argmax(1)
        last_B = mask_BT1.shape[1] - 1 - mask_BT1[..., 0].flip(1).argmax(1)
        row_B = torch.arange(len(mask_BT1), device=mask_BT1.device)
        return hidden_BTD[row_B, first_B if mode == "cls" else last_B]
    weights_BT1 = mask_BT1.cumsum(1) * mask_BT1 if mode == "weightedmean" else mask_BT1
    count_B1 = weights_BT1.sum(1).clamp(min=1)
    if mode == "mean_sqrt_len_tokens":
        count_B1 = count_B1.sqrt()
    return (hidden_BTD * weights_BT1).sum(1) / count_B1
