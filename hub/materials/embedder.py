"""The sentence encoder by which routers compare inputs with examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experthub.hub.bases.base import load_model, load_tokenizer
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import IntegrityError, UsageError
from experthub.hub.materials.router_state import State
from experthub.hub.progress import Report
from experthub.hub.readers.similarity import embedded
from experthub.hub.registry.registry import Registry
from torch import Tensor


class Embedder:
    """Texts to unit embeddings `[N, D]`, by a sentence encoder.

    fingerprint: of the encoder's weights.
    """

    def __init__(self, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self.model, self.tokenizer, self.fingerprint = model, tokenizer, fingerprint

    @classmethod
    def of(cls, name: str, registry: Registry | None, report: Report) -> Embedder:
        """The one of a name; UsageError for a base that is no encoder."""
        base = find(name, registry or Registry.read(), report)
        if not base.encoder:
            raise UsageError(f"embedder {name} is no sentence encoder", "say all-minilm-l6-v2")
        return cls(load_model(base, "float32", None), load_tokenizer(base), base.fingerprint)

    def check(self, state: State) -> None:
        """Raise IntegrityError when an index was made by another encoder."""
        if state.embedder != self.fingerprint:
            raise IntegrityError(
                f"the index was embedded by {str(state.embedder)[:19]}, and embedder is now "
                f"{self.fingerprint[:19]}",
                "name the encoder that it was made with as embedder:, or make it again",
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return embedded(self.model, self.tokenizer, texts)
