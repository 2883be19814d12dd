"""Text from a composed model."""

from __future__ import annotations

from typing import Any

from experthub.hub.bases.base import load_tokenizer
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
    """What the model writes after a prompt.

    max_new_tokens: at least 1.  temperature: >= 0; 0 takes the likeliest token.  chat: put the
    prompt into the tokenizer's chat template.  Raises UsageError for a model that cannot generate.
    """
    check_generates(composition)
    tokenizer = load_tokenizer(composition.plan.base)
    ids = tokenizer(in_chat(composition, tokenizer, prompt) if chat else prompt)["input_ids"]
    written = generate_ids(composition, tokenizer, ids, max_new_tokens, temperature)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def check_generates(composition: Composition) -> None:
    """Raise UsageError for a model that cannot generate."""
    if not composition.model.can_generate():
        raise UsageError(
            f"{composition.plan.base.name} is a {type(composition.model).__name__}, which cannot generate",
            "use a causal language model as the base",
        )


def in_chat(composition: Composition, tokenizer: Any, prompt: str) -> str:
    """The prompt in the tokenizer's chat template; UsageError when it has none."""
    if not tokenizer.chat_template:
        raise UsageError(f"{composition.plan.base.name} has no chat template", "leave out --chat")
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
    """The tokens that the model writes after others; UsageError when there are none."""
    import torch

    if not ids:
        raise UsageError("the prompt is empty", "write some text after --prompt")
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
