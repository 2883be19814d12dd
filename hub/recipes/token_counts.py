"""The number of tokens of texts, without loading a model or its libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CHARACTERS = 3  # Characters of a token, in English text with a usual vocabulary.


def count_tokens(folder: Path, texts: Sequence[str]) -> list[int]:
    """Count the tokens of texts, without special tokens.

    Args:
        folder: The model folder.
        texts: The texts.

    Returns:
        The count of each text. It is estimated from the characters if the folder has no
        `tokenizer.json`, or one that cannot be used.
    """
    try:
        from tokenizers import Tokenizer

        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        own.no_truncation()
        return [len(own.encode(text, add_special_tokens=False).ids) for text in texts]
    except BaseException as error:
        # A panic in the Rust code of tokenizers is a BaseException without a public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
    return [len(text) // CHARACTERS for text in texts]
