"""Sentence encoders, with which routers compare inputs with examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.errors import IntegrityError, UsageError
from experthub.hub.formats.embedding_rule import EmbeddingRule
from experthub.hub.readers.similarity import embed, find_rule
from experthub.hub.readers.window import Window
from torch import Tensor


class SentenceEncoder:
    """A sentence encoder, called with N texts for their unit embeddings `[N, D]`.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        base: The base that it was loaded from.
        rule: The rule of the base, see `find_rule`.
    """

    def __init__(self, model: Any, tokenizer: Any, base: Base, rule: EmbeddingRule) -> None:
        self.model, self.tokenizer, self.base, self.rule = model, tokenizer, base, rule
        self.window = Window.of(base)

    @property
    def fingerprint(self) -> str:
        """The digest of the base: of its weights, its configuration and its tokenizer."""
        return self.base.digest

    @classmethod
    def load(cls, base: Base) -> SentenceEncoder:
        """Load a sentence encoder.

        Args:
            base: The encoder.

        Returns:
            The encoder, on the CPU in float32.

        Raises:
            UsageError: The base is not a sentence encoder, or its embeddings cannot be computed.
        """
        if not base.is_encoder:
            raise UsageError(
                f"embedder {base.name} is not a sentence encoder",
                "use the encoder all-minilm-l6-v2",
            )
        rule = find_rule(base)  # An encoder that cannot be used is refused before it is loaded.
        return cls(load_model(base, "float32", None), load_tokenizer(base), base, rule)

    def check(self, fingerprint: str | None) -> None:
        """Check that an index was made by this encoder.

        Args:
            fingerprint: The fingerprint of the encoder that made the index. Earlier versions stored
                the fingerprint of its weights, and averaged all tokens. None without an index.

        Raises:
            IntegrityError: The index was made by another encoder.
        """
        earlier = (self.base.fingerprint,) if self.rule.is_plain else ()
        if fingerprint not in (None, self.fingerprint, *earlier):
            raise IntegrityError(
                f"the index was made by the sentence encoder {str(fingerprint)[:19]}, "
                f"and embedder: names {self.fingerprint[:19]}",
                "name the encoder that made the index, or remove router: to make the index again",
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the unit embeddings `[N, D]` of texts."""
        return embed(self.model, self.tokenizer, texts, self.window, self.rule)
