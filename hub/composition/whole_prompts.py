"""Generation with routers that decide for whole rows: each whole prompt decides, and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from experthub.hub.composition.prompt_length import decide_by
from experthub.hub.composition.rows import repeated
from torch import Tensor


@dataclass(eq=False)
class WholePrompts:
    """A function in place of a model's `generate`, which lets the whole prompt decide.

    Prompt lookup and assistants put guessed tokens behind the prompt in the first forward pass, and
    a chunked prefill reads only a part of the prompt in it.

    Args:
        model: The composed model.
    """

    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, without splitting the prompt.

        Args:
            *args: The arguments of the model's own `generate`.
            **kwargs: Its settings; `prefill_chunk_size` is ignored.

        Returns:
            What the model's own `generate` returns.
        """
        named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        given = args[0] if args else next((found for found in named if found is not None), None)
        is_text = isinstance(given, Tensor) and given.ndim > 1
        by_prompt = decide_by(given.shape[1]) if given is not None and is_text else nullcontext()
        before = repeated.set(True)
        try:
            with by_prompt:
                return type(self.model).generate(
                    self.model, *args, **{**kwargs, "prefill_chunk_size": None}
                )
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
