"""Quantised weights: what `config.json` says about them, and names of quantised copies of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Quantisation:
    """The way in which the weights of a base are quantised.

    Args:
        label: The way in words, for messages.
        method: The name of the method in transformers.
        package: The package that transformers needs to load such weights; None if it needs none.
        dequantised: The weights are turned into ordinary ones when they are loaded.
        supported: The hub loads such weights; the others were not tried, and are refused.
    """

    label: str
    method: str
    package: str | None = None
    dequantised: bool = False
    supported: bool = True


KNOWN = (
    Quantisation("in float8", "fp8", dequantised=True),
    Quantisation("in MXFP4", "mxfp4", dequantised=True),
    Quantisation("by bitsandbytes", "bitsandbytes", "bitsandbytes"),
    Quantisation("by GPTQ", "gptq", supported=False),
    Quantisation("by AWQ", "awq", supported=False),
    Quantisation("by HQQ", "hqq", supported=False),
)
METHODS = {known.method: known for known in KNOWN}
# What the names of quantised copies end with, such as -unsloth-bnb-4bit, -GPTQ-Int4 and -AWQ.
ENDINGS = re.compile(
    r"[-_.](unsloth-bnb-4bit|bnb-4bit|bnb-8bit|4bit|8bit|gptq(-int[48])?|awq(-int4)?|int[48]"
    r"|fp8(-dynamic)?|hqq|quantized|w[48]a(8|16)|gguf)$",
    re.I,
)


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """Read the quantisation that a base's configuration states.

    Args:
        config: The content of `config.json`.

    Returns:
        The quantisation; None if the weights are not quantised. A method that is not known here is
        returned by its name, as not supported.
    """
    stated = config.get("quantization_config")
    text = config.get("text_config")
    if not isinstance(stated, dict) and isinstance(text, dict):
        stated = text.get("quantization_config")
    if not isinstance(stated, dict):
        return None
    four, eight = bool(stated.get("load_in_4bit")), bool(stated.get("load_in_8bit"))
    method = str(stated.get("quant_method") or ("bitsandbytes" if four or eight else "unknown"))
    found = METHODS.get(method) or Quantisation(f"by {method[:40]}", method, supported=False)
    if method != "bitsandbytes":
        return found
    return replace(found, label=f"in {4 if four else 8} bits {found.label}")


def find_original_name(name: str) -> str | None:
    """Find the name of the model that a quantised copy was made from, by the end of the copy's name.

    Args:
        name: The name, such as `unsloth/Llama-3.2-1B-bnb-4bit`.

    Returns:
        The name without the ending, such as `unsloth/Llama-3.2-1B`; None if it has no such ending.

    Example:
        >>> find_original_name("unsloth/Qwen3-8B-unsloth-bnb-4bit")
        'unsloth/Qwen3-8B'
    """
    found = name
    while shorter := ENDINGS.sub("", found):
        if shorter == found:
            break
        found = shorter
    return found if found != name else None
