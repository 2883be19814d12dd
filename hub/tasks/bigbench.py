"""BIG-bench's JSON tasks, read straight out of its source archive."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.files.atomic import ensure_space, hub_home, locked
from experthub.hub.files.yaml_files import did_you_mean
from experthub.hub.progress import Report, silent
from experthub.hub.store.store import Store
from experthub.hub.tasks.task import Card, Example, example_id, write_task

VERSION = "1.0.0"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
SIZE = 358_249_635
MAX_LABELS = 20  # a task with at most so many different targets has them as its choices
MAX_PREFIX_WORDS = 60  # longer instructions would make up most of every prompt: left out
# The dataset underneath, for tasks that were not written for BIG-bench.
SOURCES = {
    "bbq_lite": "bbq",
    "bbq_lite_json": "bbq",
    "discourse_marker_prediction": "discovery",
    "elementary_math_qa": "mathqa",
    "fact_checker": "fever",
    "goal_step_wikihow": "wikihow",
    "intent_recognition": "snips",
    "international_phonetic_alphabet_nli": "anli",
    "movie_recommendation": "movielens",
    "presuppositions_as_nli": "nope",
    "reasoning_about_colored_objects": "colored_objects",
    "social_iqa": "socialiqa",
    "strategyqa": "strategyqa",
    "winowhy": "wsc273",
}


def archive(store: Store, report: Report = silent) -> Path:
    """BIG-bench's source archive, downloaded once into the store."""
    if SHA256 in store:
        return store.checked(SHA256)
    with locked(hub_home() / "locks" / "bigbench"):
        if SHA256 not in store:
            from experthub.hub.transfer.remotes import pypi

            ensure_space(store.root, 2 * SIZE)
            partial = pypi.fetch(
                "bigbench",
                VERSION,
                ".tar.gz",
                hub_home() / "partial",
                lambda done, size: report("fetching BIG-bench", done, size),
                SHA256,
            )
            store.put(partial, SHA256)
            partial.unlink()
    return store.path(SHA256)


def import_tasks(
    names: list[str], store: Store, report: Report = silent
) -> tuple[list[str], list[str]]:
    """Import the tasks named, or all of them; returns the references, and names left out with why.

    A name may be a task (`implicatures`), a sub-task (`natural_instructions/subtask046...`, cut as
    short as is unique), or a family with all its sub-tasks.
    """
    return import_archive(archive(store, report), names, report)


def import_again(name: str, store: Store) -> None:
    """Put a damaged task in the place of itself, from the archive."""
    for found, load, _ in _tasks(archive(store)):
        if found == name:
            write_task("bigbench", *convert(name, load()), renew=True)
            return
    raise NotFoundError(f"BIG-bench has no task {name!r}", "remove it")


def import_archive(
    path: Path, names: list[str], report: Report = silent
) -> tuple[list[str], list[str]]:
    """As `import_tasks`, from an archive at hand."""
    size = path.stat().st_size
    done: list[str] = []
    left_out: list[str] = []
    known: list[str] = []
    found: set[str] = set()
    for name, load, at in _tasks(path):
        known.append(name)
        report("reading BIG-bench", at, size)
        chosen = [
            n for n in names if name == n or name.startswith((f"{n}/", n if "/" in n else f"{n}/"))
        ]
        if names and not chosen:
            continue
        found.update(chosen)
        try:
            done.append(write_task("bigbench", *convert(name, load())))
        except HubError as error:
            left_out.append(f"{name}: {error.message}")
    missing = [n for n in names if n not in found]
    if missing:
        raise NotFoundError(
            f"BIG-bench has no task {missing[0]!r}", did_you_mean(missing[0], known)
        )
    return done, left_out


def _tasks(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]], int]]:
    """Name, content and position of every task.json, in one pass over the archive."""
    with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|gz") as tar:
        for member in tar:
            found = re.search(r"/benchmark_tasks/(.+)/task\.json$", member.name)
            if found and member.isfile():
                file = cast(IO[bytes], tar.extractfile(member))
                yield found.group(1), partial(json.load, file), raw.tell()


def convert(name: str, content: dict[str, Any]) -> tuple[Card, list[Example]]:
    """A task.json as card and examples; HubError when it has no examples with one right answer.

    The prompt is BIG-bench's own zero-shot one, stripped.  Choices are put into an order that
    depends on their text alone, because in some tasks the right one always comes first.  Tasks
    with free answers, of which there are few, have them as their choices.
    """
    raw = [e for e in content.get("examples") or () if isinstance(e.get("input"), str)]
    labels = _labels(raw)
    examples = [e for e in (_example(item, labels) for item in raw) if e is not None]
    if not examples:
        raise HubError("has no examples with one right answer")
    scored = any(e.get("target_scores") for e in raw)
    listed = content.get("append_choices_to_input", True) and scored
    prefix = content.get("task_prefix", "")
    template = (
        (prefix if len(prefix.split()) <= MAX_PREFIX_WORDS else "")
        + content.get("example_input_prefix", "\nQ: ")
        + "{input}"
        + ("{choices}" if listed else "")
        + content.get("example_output_prefix", "\nA: ")
    )
    family, _, subtask = name.partition("/")
    source = SOURCES.get(family, family)
    if family == "natural_instructions":
        found = re.match(r"subtask\d+_([a-z]+)", subtask)
        source = found.group(1) if found else family
    card = Card(
        name=name,
        source=source,
        license="apache-2.0",
        category=(content.get("keywords") or [None])[0],
        kind="choices" if examples[0].choices is not None else "generation",
        metric="accuracy" if examples[0].choices is not None else "exact_match",
        template=re.sub(r"[ \t]+\n", "\n", template).strip(),
        labels=labels,
    )
    return card, examples


def _labels(raw: list[dict[str, Any]]) -> list[str] | None:
    """The answers that every example shares, sorted; None when they differ."""
    scored = [e["target_scores"] for e in raw if e.get("target_scores")]
    if scored:
        first = set(scored[0])
        same = all(set(s) == first for s in scored) and len(first) <= MAX_LABELS
        return sorted(c.strip() for c in first) if same else None
    targets = {t for e in raw for t in _targets(e)}
    return sorted(targets) if 2 <= len(targets) <= MAX_LABELS else None


def _targets(item: dict[str, Any]) -> list[str]:
    target = item.get("target")
    return [
        t.strip() for t in (target if isinstance(target, list) else [target]) if isinstance(t, str)
    ]


def _example(item: dict[str, Any], labels: list[str] | None) -> Example | None:
    text = item["input"].strip()
    if item.get("target_scores"):
        scores = {choice.strip(): score for choice, score in item["target_scores"].items()}
        best = max(scores.values())
        right = [choice for choice, score in scores.items() if score == best]
        choices = labels or sorted(
            scores, key=lambda c: hashlib.sha256(f"{text}\0{c}".encode()).digest()
        )
        if len(right) != 1 or len(choices) < 2 or "" in choices:
            return None
        return Example(
            id=example_id(text, choices),
            input=text,
            choices=choices,
            answer=choices.index(right[0]),
        )
    targets = _targets(item)
    if not targets or not text:
        return None
    if labels:
        if len(targets) > 1:
            return None
        return Example(
            id=example_id(text, labels), input=text, choices=labels, answer=labels.index(targets[0])
        )
    return Example(id=example_id(text, ()), input=text, targets=targets)
