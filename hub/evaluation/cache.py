"""A cache of scores, keyed by a digest of everything that they depend on.

A unit is up to 32 questions that are scored together. Its scores depend only on the composition,
the questions, the scorer, the device and the versions of the packages. Cached scores are therefore
identical, to the last digit, to those that would be computed now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_text
from experthub.hub.files.digests import digest_of, encode_json, find_not_finite
from experthub.hub.readers.scorer import Question, Scores

UNIT = 32


@dataclass(frozen=True)
class Unit:
    """A unit of questions that are scored together.

    Args:
        surroundings: Everything else that the scores depend on, as plain values.
        questions: The questions, at most 32.
    """

    surroundings: dict[str, Any]
    questions: tuple[Question, ...]

    @property
    def path(self) -> Path:
        """The file of the scores, named by a digest of everything that they depend on."""
        asked = [[q.text, *q.choices] for q in self.questions]
        key = digest_of({**self.surroundings, "questions": asked}).removeprefix("sha256:")
        return hub_home() / "results" / key[:2] / f"{key[2:]}.json"

    def read(self) -> list[Scores] | None:
        """Read the cached scores.

        Returns:
            The scores of every question, in order; None if they are not cached or are damaged.
        """
        try:
            record = json.loads(self.path.read_text())
            rows = record["scores"]
            if record.get("check", digest_of(rows)) != digest_of(rows):
                return None
            found = [Scores(tuple(map(float, v)), tuple(map(int, t))) for v, t in rows]
        except (HubError, OSError, ValueError, KeyError, TypeError):
            return None
        fits = [
            len(s.values) == len(q.choices) == len(s.tokens)
            for s, q in zip(found, self.questions, strict=False)
        ]
        return found if len(found) == len(self.questions) and all(fits) else None

    def write(self, scores: Sequence[Scores]) -> None:
        """Write the scores into the cache, unless one of them is NaN or infinite.

        Args:
            scores: The scores of every question, in order.
        """
        rows = [[s.values, s.tokens] for s in scores]
        if any(find_not_finite(rows)):
            return
        record = {**self.surroundings, "scores": rows, "check": digest_of(rows)}
        write_text(self.path, encode_json(record))


def split_into_units(surroundings: dict[str, Any], questions: Sequence[Question]) -> list[Unit]:
    """Split questions into units.

    Args:
        surroundings: Everything else that the scores depend on, as plain values.
        questions: The questions.

    Returns:
        The units, in the order of the questions.
    """
    starts = range(0, len(questions), UNIT)
    return [Unit(surroundings, tuple(questions[at : at + UNIT])) for at in starts]
