"""Prompts of a trace: the examples of a task, and checks of their length."""

from __future__ import annotations

from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import UsageError
from experthub.hub.readers.features import format_text
from experthub.hub.tasks.task_files import read_task


def read_prompts(base: Base, reference: str, limit: int) -> list[str]:
    """Read prompts from the first examples of a task, of all splits.

    Args:
        base: The base that reads the prompts.
        reference: The reference of the task.
        limit: The largest number of examples.

    Returns:
        The filled template for a causal language model, or the input alone for another base.
    """
    task, causal = read_task(reference), base.is_causal
    return [format_text(task, e, causal) for e in task.split("all", limit)]


def check_length(tokens: int, new_tokens: int, number: int, model: Any, base: Base) -> None:
    """Refuse a prompt that is empty or, with its continuation, longer than the model can read.

    Args:
        tokens: The number of tokens of the prompt.
        new_tokens: The number of tokens to generate.
        number: The number of the prompt, from 0.
        model: The model.
        base: The base of the model.

    Raises:
        UsageError: The prompt has no tokens, or the model reads fewer tokens.
    """
    if not tokens:
        raise UsageError(f"prompt {number + 1} is empty", "pass some text after --prompt")
    count = tokens + new_tokens
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and count > longest:
        raise UsageError(
            f"prompt {number + 1} has {count} tokens, including those to generate, "
            f"but {base.name} reads at most {longest}",
            "shorten the prompt, or generate fewer tokens",
        )
