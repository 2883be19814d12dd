"""The file of a soft prompt or of a prefix: `soft_prompt.safetensors`.

A soft prompt is one tensor `prompt` `[N, H]`: embeddings that stand before those of a text. A prefix
is two tensors `keys` and `values` `[L, A, N, D]`: what every layer attends to before a text.

Shapes: N virtual tokens, H features of an embedding, L layers, A heads of keys and values, D features
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import IntegrityError
from experthub.hub.formats.safetensors_header import FLOATS, read_header

PROMPT = "soft_prompt.safetensors"
PROMPT_EMBEDDINGS = "prompt_embeddings"  # The tensor in the files of peft.
MAX_VIRTUAL_TOKENS = 1 << 20
HINT = "get the file again, or convert the adapter again with hub convert"
# The tensors of each form, and the number of their dimensions.
FORMS = {("prompt",): 2, ("keys", "values"): 4}


@dataclass(frozen=True)
class PromptShape:
    """The shape of a soft prompt or of a prefix.

    Args:
        tokens: The number of virtual tokens N.
        width: The features of an embedding H, or of a head D for a prefix.
        layers: The number of layers L of a prefix; 0 for a soft prompt.
        heads: The number of heads A of a prefix; 0 for a soft prompt.
    """

    tokens: int
    width: int
    layers: int = 0
    heads: int = 0

    @property
    def is_prefix(self) -> bool:
        """True for keys and values of every layer, false for embeddings before the text."""
        return self.layers > 0

    @property
    def label(self) -> str:
        """The name of the form, with an article."""
        return "a prefix" if self.is_prefix else "a soft prompt"


def read_prompt(path: Path) -> PromptShape:
    """Read the shape of a soft prompt or of a prefix from the header of its file.

    Args:
        path: The path of `soft_prompt.safetensors`.

    Returns:
        The shape.

    Raises:
        IntegrityError: The file is malformed, or holds other tensors.
    """
    header = read_header(path)
    shapes = {info.shape for info in header.values()}
    dtypes = {info.dtype for info in header.values()}
    sides = FORMS.get(tuple(sorted(header)))
    shape = next(iter(shapes), ())
    if sides != len(shape) or len(shapes) != 1 or len(dtypes) != 1 or not dtypes <= {*FLOATS}:
        raise IntegrityError(
            f"{path}: expected a float tensor 'prompt' [tokens, features], or 'keys' and 'values' "
            "[layers, heads, tokens, features] of one dtype, found "
            f"{ ({name: [i.dtype, *i.shape] for name, i in list(header.items())[:4]}) }",
            HINT,
        )
    if 0 in shape or shape[-2] > MAX_VIRTUAL_TOKENS:
        raise IntegrityError(
            f"{path}: {list(shape)} has {shape[-2]} virtual tokens of {shape[-1]} features; "
            f"expected from 1 to {MAX_VIRTUAL_TOKENS}",
            HINT,
        )
    return PromptShape(shape[-2], shape[-1], *(shape[:2] if sides == 4 else ()))
