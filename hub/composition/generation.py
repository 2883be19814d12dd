"""Generation of text with a composed model."""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.chat_template import render_chat
from experthub.hub.composition.composition import Composition
from experthub.hub.composition.overflow import check_logits
from experthub.hub.errors import UsageError
from experthub.hub.progress import Report, silent
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.scorer import Long
from experthub.hub.readers.tokens import tokenise, tokenise_prompt
from experthub.hub.readers.window import Window

COLDEST, HOTTEST = 1e-4, 1e4  # The temperatures of sampling, besides 0.
# Transformers samples with the random generator of the process, so threads take turns.
_sampling = Lock()


def generate_text(
    composition: Composition,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
    long: Long = "cut",
    report: Report = silent,
) -> str:
    """Generate the continuation of a prompt, or the answer of an encoder-decoder to it.

    The text is one beam, even if the base's `generation_config.json` asks for more: a note says so.

    Args:
        composition: A composed causal language model, or an encoder-decoder.
        prompt: The text before the continuation.
        max_new_tokens: The largest number of generated tokens, at least 1.
        temperature: The temperature of sampling, from 0.0001 to 10000. 0 always takes the most
            likely token.
        chat: Put the prompt into the chat template of the tokenizer.
        long: `cut` drops the first tokens of a prompt that does not fit with the generated tokens,
            `refuse` raises an error.
        report: A callback for notes: a prompt is cut, or the base asks for several beams.

    Returns:
        The generated text, without the prompt and without special tokens.

    Raises:
        UsageError: The model cannot generate, the prompt is empty or too long, there is no chat
            template, or the temperature is out of its range.
        HubError: The base has no tokenizer.
        IntegrityError: The model computes NaN or infinity.
    """
    check_temperature(temperature)
    check_can_generate(composition)
    base = composition.plan.base
    window = Window.of(base, long, report, composition.plan.virtual_tokens)
    tokenizer = load_tokenizer(base)
    ids = read_prompt(base, tokenizer, prompt, chat, window, max_new_tokens)
    beams = getattr(composition.model.generation_config, "num_beams", None)
    if isinstance(beams, int) and beams > 1:
        report(
            f"note: {base.name} asks for {beams} beams in its settings of generation; the hub "
            "generates with one, and its text can differ from that of transformers",
            0,
            0,
        )
    written = generate_ids(composition, tokenizer, ids, max_new_tokens, temperature)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def check_temperature(temperature: float) -> None:
    """Refuse a temperature with which sampling would divide logits to infinity or NaN.

    Args:
        temperature: The temperature of sampling.

    Raises:
        UsageError: It is neither 0 nor a number from `COLDEST` to `HOTTEST`.
    """
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise UsageError(
            f"the temperature {temperature:g} is out of range",
            f"set 0, or a number from {COLDEST:g} to {HOTTEST:g}",
        )


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


def read_prompt(
    base: Base,
    tokenizer: Any,
    prompt: str,
    chat: bool = False,
    window: Window | None = None,
    new_tokens: int = 0,
) -> list[int]:
    """Tokenise a prompt as a base reads it.

    A causal language model gets no special tokens behind the prompt, because EOS would end the text
    before its continuation. Other models get all special tokens.

    Args:
        base: The base.
        tokenizer: The tokenizer of the base.
        prompt: The prompt.
        chat: Put the prompt into the chat template of the tokenizer, as the message of a user. The
            template writes the special tokens itself.
        window: The window of the base, to which the prompt is cut; None keeps all tokens.
        new_tokens: The number of tokens that a causal language model is to generate.

    Returns:
        The token ids.

    Raises:
        UsageError: The tokenizer has no chat template, or the window refuses the prompt.
        HubError: The chat template cannot be used, or exceeds the limits of `render_chat`.
    """
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{base.name} has no chat template", "remove --chat")
    if chat:
        prompt = render_chat(base, tokenizer, prompt)
    if base.is_causal:
        return list(tokenise_prompt(tokenizer, prompt, window, new=new_tokens, special=not chat))
    return list(tokenise(tokenizer, prompt, window, special=not chat))


def generate_ids(
    composition: Composition,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[int]:
    """Generate the tokens that follow other tokens.

    Sampling is seeded with the recipe's seed. Threads that sample take turns.

    Args:
        composition: A composed causal language model, or an encoder-decoder.
        tokenizer: The tokenizer of its base.
        ids: The ids of the prompt's tokens.
        max_new_tokens: The largest number of generated tokens, at least 1.
        temperature: The temperature of sampling, >= 0. 0 always takes the most likely token.

    Returns:
        The ids of the generated tokens.

    Raises:
        UsageError: The prompt has no tokens.
        IntegrityError: The model computes NaN or infinity.
    """
    import torch

    if not ids:
        raise UsageError(
            "the prompt is empty",
            "pass a text with --prompt; with --chat, check the chat template of the base, too",
        )
    given = torch.tensor([ids], device=composition.model.device)
    settings = {
        "input_ids": given,
        "attention_mask": torch.ones_like(given),
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "num_beams": 1,
        "num_return_sequences": 1,
        # A base may set these. A router would then read guessed tokens as part of the prompt.
        "assistant_early_exit": None,
        "prompt_lookup_num_tokens": None,
        "logits_processor": [partial(check_logits, composition)],
    }
    with explain_forward_errors(composition.model, "generate with"):
        if temperature:
            with _sampling:
                torch.manual_seed(composition.plan.recipe.seed)
                written = composition.model.generate(
                    **settings, do_sample=True, temperature=temperature
                )
        else:
            written = composition.model.generate(**settings, do_sample=False)
    # An encoder-decoder returns its answer alone, which begins with the token that starts decoding.
    start = 1 if composition.model.config.is_encoder_decoder else len(ids)
    new: list[int] = written[0, start:].tolist()
    return new
