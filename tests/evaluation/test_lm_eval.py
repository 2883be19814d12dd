"""Scores against lm-evaluation-harness itself, which runs in a virtual environment of its own.

Tokens that span the end of a prompt are scored in another way, see docs/evaluation.md.

The environment is the one of `benchmarks/evaluate.py`, kept below the hub home of whoever runs this.
"""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama
from experthub.hub.bases import base as bases
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.files.atomic import hub_home

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CACHE = hub_home() / "benchmarks"  # read before a test has a hub home of its own

PLAIN = [
    ("Is 7 even?\nAnswer:", ["yes", "no", "it depends on the base"]),
    ("one", ["a", "bb", "c d e"]),
    ("a much longer prompt, in several words, with a question at its end?", ["same", "samf"]),
    ("equal choices:", ["left", "left right", "left right left"]),
]
UNICODE = [
    ("¿Dónde está?", ["aquí", "allá", "日本", "日本語"]),
    (
        "Wie heißt „Straße“ \U0001f6e3",
        ["дом", "ulic\u0301a", "\U0001f469\u200d\U0001f467 \U0001f6e3"],
    ),
    ("e\u0301 or \u00e9:", ["\u00e9", "e\u0301", "\ufb01"]),
]
ENDS = [
    (f"What follows{end}", ["yes", "now", "yet", "y e s"]) for end in '(".:-_…“)\\\u200b\ufffd🙂\0'
]
SPACES = [
    (f"What follows:{end}", ["yes", "now", "yet", "yyyyyyyyyyy"])
    for end in (" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", " \n ")
]
QUESTIONS = {"plain": PLAIN, "unicode": UNICODE, "ends": ENDS, "spaces": SPACES}


@pytest.fixture(scope="module")
def harness() -> Any:
    """The module `benchmarks/evaluate.py`, with its environment installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("evaluate")
    try:
        module.environment(CACHE / "lm-eval-venv", module.SHARED, module.PINS)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"lm-eval cannot be installed here: {error}")
    return module


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder with its tokenizer changed."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def beginning(tokenizer: dict[str, Any]) -> None:
    """Put <s> in front of every text."""
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}
    text["Sequence"]["type_id"] = 0
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }


@pytest.fixture(scope="module", params=["bytes", "beginning"])
def sides(
    request: pytest.FixtureRequest, harness: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Any], list[Any]]]:
    """Tokenise every group of questions on both sides with one tokenizer."""
    folder = tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=300)
    change = {"beginning": beginning}.get(request.param)
    base = bases.read(edited(folder, change) if change else folder, "tiny")
    tokenizer, model = load_tokenizer(base).tokenizer, load_model(base, "float32", "cpu")
    peer = harness.LmEval(CACHE, folder, tmp_path_factory.mktemp("tasks"))
    found = {}
    for group, rows in QUESTIONS.items():
        asked = [
            harness.Question(prompt, tuple(choices), number % len(choices))
            for number, (prompt, choices) in enumerate(rows)
        ]
        found[group] = harness.score(model, tokenizer, asked), peer.score(group, asked)
    peer.close()
    return found


@pytest.mark.parametrize("group", QUESTIONS)
def test_every_decision_is_that_of_lm_eval(
    group: str, harness: Any, sides: dict[str, tuple[list[Any], list[Any]]]
) -> None:
    """The same token ids, sums of log-probabilities, and decisions by sum and by mean."""
    ours, theirs = sides[group]
    for (prompt, choices), mine, other in zip(QUESTIONS[group], ours, theirs, strict=True):
        assert mine.ids == other.ids, (prompt, choices)
        assert mine.sums == pytest.approx(other.sums, abs=1e-3), (prompt, choices)
        assert harness.best(mine.sums) == harness.best(other.sums), (prompt, choices)
        assert harness.best(mine.means) == harness.best(other.means), (prompt, choices)
