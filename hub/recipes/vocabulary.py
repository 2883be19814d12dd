"""The vocabulary of a composition: the tokens of the base and those that its experts add, by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.bases.tokenizer import add_tokens
from experthub.hub.bases.vocabulary import find_vocabulary
from experthub.hub.errors import HubError
from experthub.hub.formats.added_tokens import AddedVocabulary, NewToken
from experthub.hub.recipes.planned_experts import Member


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a composition's embeddings, and where each expert has them.

    Attributes:
        own: The rows of the base.
        rows: The rows of the composition.
        tokens: The new tokens with their ids in the composition.
        sources: For each expert, by digest, the rows that it does not have in the place of the
            base's: composition's row -> expert's row, or -1 for a row that the expert lacks.
        parameters: The parameters whose rows are tokens.
    """

    own: int
    rows: int
    tokens: tuple[NewToken, ...]
    sources: Mapping[str, Mapping[int, int]]
    parameters: frozenset[str]

    @property
    def added(self) -> AddedVocabulary:
        """The tokens and rows that the base lacks."""
        return AddedVocabulary(self.rows, self.tokens)

    @property
    def new(self) -> list[int]:
        """The rows that are not the base's, in order."""
        return sorted({token.id for token in self.tokens} | {*range(self.own, self.rows)})


def plan_vocabulary(base: Base, members: Sequence[Member]) -> Vocabulary | None:
    """Unite the vocabularies of a base and of experts.

    A token keeps its text. New tokens get the next free ids, in the order of the experts. Rows
    without a token, such as padding, keep their place.

    Args:
        base: The base.
        members: The stored experts.

    Returns:
        The vocabulary; None if no expert has another one than the base.

    Raises:
        HubError: Two experts have rows in one place, and the tokens of one of them are unknown.
    """
    known = {member.digest: member for member in members}
    if not any(m.footprint.rows or m.footprint.tokens for m in known.values()):
        return None
    parameters = find_vocabulary(base)
    own = max(base.shapes[name][0] for name in parameters if name in base.shapes)
    heights = {d: max(m.footprint.rows.values(), default=own) for d, m in known.items()}
    usable = {
        d: [t for t in m.footprint.tokens if t.id < max(own, heights[d])] for d, m in known.items()
    }
    ids, tokens, vocabulary = _assign_ids(base, own, usable)
    texts = {i: text for text, i in vocabulary.items()}
    sources: dict[str, dict[int, int]] = {digest: {} for digest in known}
    for digest, listed in usable.items():
        for token in listed:
            if texts.get(token.id, token.content) != token.content:
                sources[digest].setdefault(token.id, -1)
        for token in listed:
            if ids[token.content] != token.id or token.id >= own or token.content not in vocabulary:
                sources[digest][ids[token.content]] = token.id
    taken = {token.id for token in tokens}
    for digest, member in known.items():
        named = {token.id for token in usable[digest]}
        _place_others(member, {*range(own, heights[digest])} - named, taken, sources, known)
    placed = {row for rows in sources.values() for row in rows}
    if not placed and all(height == own for height in heights.values()):
        return None
    return Vocabulary(own, max([own, *(row + 1 for row in placed)]), tokens, sources, parameters)


def _assign_ids(
    base: Base, own: int, usable: Mapping[str, Sequence[NewToken]]
) -> tuple[dict[str, int], tuple[NewToken, ...], dict[str, int]]:
    """Give each token of the experts an id; return the ids, the new tokens and the base's vocabulary."""
    listed = [token for tokens in usable.values() for token in tokens]
    tokenizer: Any = load_tokenizer(base) if base.has_tokenizer and listed else None
    vocabulary: dict[str, int] = dict(tokenizer.get_vocab()) if tokenizer else {}
    ids: dict[str, int] = {}
    new: list[NewToken] = []
    for token in listed:
        if token.content in ids:
            continue
        if token.content in vocabulary or (tokenizer is None and token.id < own):
            ids[token.content] = vocabulary.get(token.content, token.id)
            continue
        if tokenizer is not None:
            add_tokens(tokenizer, [token])
            ids[token.content] = int(tokenizer.convert_tokens_to_ids(token.content))
        else:
            free = max([own - 1, *(t.id for t in new)]) + 1
            taken = token.id < own or token.id in {t.id for t in new}
            ids[token.content] = free if taken else token.id
        new.append(NewToken(ids[token.content], token.content, token.special))
    return ids, tuple(new), vocabulary


def _place_others(
    member: Member,
    rows: set[int],
    taken: set[int],
    sources: Mapping[str, dict[int, int]],
    known: Mapping[str, Member],
) -> None:
    """Place the rows of an expert that are no tokens of its tokenizer."""
    named = bool(member.footprint.tokens)
    for row in rows:
        others = [d for d, own in sources.items() if d != member.digest and row in own]
        if row not in taken and (named or not others):
            sources[member.digest][row] = row
        elif not named:
            other = known[others[0]].reference if others else "another expert"
            raise HubError(
                f"{member.reference} and {other} have a row {row} in their embeddings, and no "
                f"tokenizer beside {member.reference} says which token it is",
                "copy the files of its tokenizer into its folder, and run hub add again",
            )
