"""Tokens that were added to a base's tokenizer, as the files beside an expert list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import write_json
from experthub.hub.files.json_files import read_json

ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS = "special_tokens_map.json"
EXPERT_TOKENIZER = (ADDED_TOKENS, SPECIAL_TOKENS, "tokenizer.json", "tokenizer_config.json")
MAX_ADDED = 1 << 16  # Tokens that an expert can add.


@dataclass(frozen=True, order=True)
class NewToken:
    """A token that a tokenizer has beside those of its vocabulary.

    Args:
        id: Its number, which is its row in the embeddings.
        content: Its text.
        special: Whether it is left out of written text.
    """

    id: int
    content: str
    special: bool = False


@dataclass(frozen=True)
class AddedVocabulary:
    """The tokens that the experts of a plan add to the vocabulary of a base.

    Args:
        rows: The rows of the embeddings.
        tokens: The new tokens, in the order of their ids.
    """

    rows: int
    tokens: tuple[NewToken, ...] = ()


def read_added_tokens(files: Mapping[str, Path], name: str) -> tuple[NewToken, ...]:
    """Read the tokens that the tokenizer of an expert has beside its vocabulary.

    Args:
        files: The paths of those of the files `EXPERT_TOKENIZER` that the expert has.
        name: The name of the expert in errors.

    Returns:
        The tokens, in the order of their ids.

    Raises:
        IntegrityError: A file is malformed, or gives one id to two tokens.
    """
    found: dict[str, NewToken] = {}
    try:
        for file in EXPERT_TOKENIZER:
            for token in _read_file(read_json(files[file]), file) if file in files else ():
                known = found.get(token.content)
                found[token.content] = max(known, token) if known else token
        special = _list_special(read_json(files[SPECIAL_TOKENS])) if SPECIAL_TOKENS in files else ()
        for text in found.keys() & special:
            found[text] = replace(found[text], special=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{name}: the added tokens of its tokenizer cannot be read: {error}",
            "save the tokenizer again with save_pretrained",
        ) from None
    ids = [token.id for token in found.values()]
    if len(set(ids)) < len(ids) or len(ids) > MAX_ADDED or any(i < 0 for i in ids):
        raise IntegrityError(
            f"{name}: the files of its tokenizer give one id to two tokens, or too many ids",
            "save the tokenizer again with save_pretrained",
        )
    return tuple(sorted(found.values()))


def write_added_tokens(folder: Path, tokens: Sequence[NewToken]) -> None:
    """Write the files that list added tokens.

    Args:
        folder: An existing folder.
        tokens: The tokens. No file is written without any.
    """
    if tokens:
        write_json(folder / ADDED_TOKENS, {token.content: token.id for token in tokens})
    if special := [token.content for token in tokens if token.special]:
        write_json(folder / SPECIAL_TOKENS, {"additional_special_tokens": special})


def _read_file(content: dict[str, Any], file: str) -> list[NewToken]:
    """Read the added tokens of one file."""
    if file == ADDED_TOKENS:
        return [NewToken(int(i), str(text)) for text, i in content.items()]
    if file == "tokenizer.json":
        rows = content.get("added_tokens") or []
        return [NewToken(int(r["id"]), str(r["content"]), bool(r.get("special"))) for r in rows]
    if file == "tokenizer_config.json":
        listed = (content.get("added_tokens_decoder") or {}).items()
        return [NewToken(int(i), str(r["content"]), bool(r.get("special"))) for i, r in listed]
    return []


def _list_special(content: dict[str, Any]) -> set[str]:
    """List the texts of the special tokens that `special_tokens_map.json` names."""
    values = [v for own in content.values() for v in (own if isinstance(own, list) else [own])]
    return {str(v["content"] if isinstance(v, dict) else v) for v in values}
