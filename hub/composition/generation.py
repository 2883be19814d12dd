"""Generation of text with a composed model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.composition import Composition
from experthub.hub.errors import HubError, UsageError
from experthub.hub.readers.similarity import tokenise

# The errors that transformers raises for settings that it cannot use.
GENERATION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def generate_text(
    composition: Composition,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
) -> str:
    """Generate the continuation of a prompt.

    Args:
        composition: A composed causal language model.
        prompt: The text before the continuation.
        max_new_tokens: The largest number of generated tokens, at least 1.
        temperature: The temperature of sampling, >= 0. 0 always takes the most likely token.
        chat: Put the prompt into the chat template of the tokenizer.

    Returns:
        The generated text, without the prompt and without special tokens.

    Raises:
        UsageError: The model cannot generate, the prompt is empty, or there is no chat template.
        HubError: The base has no tokenizer.
    """
    check_can_generate(composition)
    tokenizer = load_tokenizer(composition.plan.base)
    ids = tokenise_prompt(composition.plan.base, tokenizer, prompt, chat)
    written = generate_ids(composition, tokenizer, ids, max_new_tokens, temperature)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def check_can_generate(composition: Composition) -> None:
    """Refuse a model that cannot generate text.

    Args:
        composition: A composed model.

    Raises:
        UsageError: The model cannot generate.
    """
    if not composition.model.can_generate():
        raise UsageError(
            f"{composition.plan.base.name} is a {type(composition.model).__name__}, "
            "which cannot generate text",
            "use a causal language model as the base",
        )


def tokenise_prompt(base: Base, tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenise a prompt as a base reads it.

    Args:
        base: The base. If it is not a causal language model, it reads at most 256 tokens.
        tokenizer: The tokenizer of the base.
        prompt: The prompt.
        chat: Put the prompt into the chat template of the tokenizer, as the message of a user.

    Returns:
        The token ids.

    Raises:
        UsageError: The tokenizer has no chat template.
    """
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{base.name} has no chat template", "remove --chat")
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    # The text of a chat template contains the special tokens already.
    return list(tokenise(tokenizer, prompt, base.is_causal, add_special_tokens=not chat))


def generate_ids(
    composition: Composition,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[int]:
    """Generate the tokens that follow other tokens.

    Sampling is seeded with the recipe's seed.

    Args:
        composition: A composed causal language model.
        tokenizer: The tokenizer of its base.
        ids: The ids of the prompt's tokens.
        max_new_tokens: The largest number of generated tokens, at least 1.
        temperature: The temperature of sampling, >= 0. 0 always takes the most likely token.

    Returns:
        The ids of the generated tokens.

    Raises:
        UsageError: The prompt has no tokens.
    """
    import torch

    if not ids:
        raise UsageError("the prompt is empty", "pass a text with --prompt")
    torch.manual_seed(composition.plan.recipe.seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    given = torch.tensor([ids], device=composition.model.device)
    with _explain_generation(composition.plan.base):
        written = composition.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            num_beams=1,
            num_return_sequences=1,
            **sampling,
        )
        new: list[int] = written[0, len(ids) :].tolist()
    return new


@contextmanager
def _explain_generation(base: Base) -> Iterator[None]:
    """Turn errors of transformers into a HubError: a base comes with settings of its own."""
    try:
        yield
    except GENERATION_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise HubError(
            f"base {base.name}: transformers cannot generate with it: {reason}",
            f"correct or remove {base.folder / 'generation_config.json'}",
        ) from None
