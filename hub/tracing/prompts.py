"""Prompts of a trace: the examples of a task, and the tokens of a text."""

from __future__ import annotations

from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.errors import UsageError
from experthub.hub.readers.similarity import MAX_TOKENS
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
    task = read_task(reference)
    examples = task.split("all", limit)
    return [task.format_prompt(e) if base.is_causal else e.input for e in examples]


def tokenise_prompt(tokenizer: Any, base: Base, text: str, number: int) -> list[int]:
    """Tokenise a prompt; for an encoder, truncate it to 256 tokens.

    Args:
        tokenizer: The tokenizer of the base.
        base: The base.
        text: The prompt.
        number: The number of the prompt, from 0.

    Returns:
        The token ids.

    Raises:
        UsageError: The prompt has no tokens.
    """
    cut = {} if base.is_causal else {"truncation": True, "max_length": MAX_TOKENS}
    ids: list[int] = tokenizer(text, **cut)["input_ids"]
    if not ids:
        raise UsageError(f"prompt {number + 1} is empty", "pass some text after --prompt")
    return ids


def check_length(count: int, number: int, model: Any, base: Base) -> None:
    """Refuse a prompt that is longer, with its continuation, than the model can read.

    Args:
        count: The number of tokens, including those to generate.
        number: The number of the prompt, from 0.
        model: The model.
        base: The base of the model.

    Raises:
        UsageError: The model reads fewer tokens.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and count > longest:
        raise UsageError(
            f"prompt {number + 1} has {count} tokens, including those to generate, "
            f"but {base.name} reads at most {longest}",
            "shorten the prompt, or generate fewer tokens",
        )
