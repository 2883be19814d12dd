"""Text from a composed model."""

from __future__ import annotations

from experthub.hub.bases import load_tokenizer
from experthub.hub.composition import Composition
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
    import torch

    model, plan = composition.model, composition.plan
    if not model.can_generate():
        raise UsageError(
            f"{plan.base.name} is a {type(model).__name__}, which cannot generate",
            "use a causal language model as the base",
        )
    tokenizer = load_tokenizer(plan.base)
    if chat:
        if not tokenizer.chat_template:
            raise UsageError(f"{plan.base.name} has no chat template", "leave out --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise UsageError("the prompt is empty", "write some text after --prompt")
    torch.manual_seed(plan.recipe.seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    written = model.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
    )
    text: str = tokenizer.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text
