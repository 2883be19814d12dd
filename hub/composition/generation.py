"""Generation of text with a composed model."""

from __future__ import annotations

from typing import Any

from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.composition import Composition
from experthub.hub.errors import UsageError


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
    ids = tokenizer(apply_chat_template(composition, tokenizer, prompt) if chat else prompt)[
        "input_ids"
    ]
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


def apply_chat_template(composition: Composition, tokenizer: Any, prompt: str) -> str:
    """Put a prompt into the chat template of a tokenizer, as the message of a user.

    Args:
        composition: The composed model, whose base the error names.
        tokenizer: The tokenizer of its base.
        prompt: The text of the message.

    Returns:
        The text that the model reads.

    Raises:
        UsageError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UsageError(f"{composition.plan.base.name} has no chat template", "remove --chat")
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


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
    written = composition.model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    new: list[int] = written[0, len(ids) :].tolist()
    return new
