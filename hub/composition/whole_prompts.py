"""Generation with routers that decide for whole rows: the whole prompt is read in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experthub.hub.composition.rows import repeated
from experthub.hub.errors import UsageError

# Settings with which transformers would read a part of the prompt first, or guessed tokens with it.
SPLITTING = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass(eq=False)
class WholePrompts:
    """A function in place of a model's `generate`, which lets the whole prompt decide.

    Args:
        model: The composed model.
    """

    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, without splitting the prompt.

        Args:
            *args: The arguments of the model's own `generate`.
            **kwargs: Its settings. Those that split the prompt are ignored.

        Returns:
            What the model's own `generate` returns.

        Raises:
            UsageError: Another model guesses tokens, which would be read with the prompt.
        """
        if kwargs.get("assistant_model") is not None:
            raise UsageError(
                "the router decides by the prompt, and an assistant would add guessed tokens to it",
                "remove assistant_model, or use a router that chooses for each token",
            )
        before = repeated.set(True)
        try:
            whole = dict.fromkeys(SPLITTING)
            return type(self.model).generate(self.model, *args, **{**kwargs, **whole})
        finally:
            repeated.reset(before)


def read_whole_prompts(model: Any) -> None:
    """Let a model read whole prompts when it generates.

    Args:
        model: The composed model, which is changed in place.
    """
    if model.can_generate():
        model.generate = WholePrompts(model)


def split_prompts(model: Any) -> None:
    """Undo `read_whole_prompts`.

    Args:
        model: The composed model, which is changed in place.
    """
    vars(model).pop("generate", None)
