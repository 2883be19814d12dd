"""BIG-bench's JSON tasks, read directly from its source archive."""

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
from experthub.hub.files.atomic import hub_home
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.files.path_checks import ensure_space
from experthub.hub.files.spelling import suggest_name
from experthub.hub.progress import Report, silent
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import tasks_folder, write_task
from experthub.hub.transfer.remotes import pypi

VERSION = "1.0.0"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
SIZE = 358_249_635
MAX_LABELS = 20  # A task with at most this many different targets uses them as its choices.
MAX_PREFIX_WORDS = 60  # Longer instructions are omitted: they would dominate every prompt.
# The original dataset, for tasks that were not written for BIG-bench.
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


def fetch_archive(session: Session) -> Path:
    """Download BIG-bench's source archive into the store, unless it is there.

    Args:
        session: The store and the progress callback.

    Returns:
        The path of the archive in the store.

    Raises:
        HubError: The disk has too little free space, or the download failed.
    """
    store = session.store
    if SHA256 in store:
        return store.verify_object(SHA256)
    with hold_lock(hub_home() / "locks" / "bigbench"):
        if SHA256 not in store:
            ensure_space(store.root, 2 * SIZE)
            partial = pypi.fetch(
                "bigbench",
                VERSION,
                ".tar.gz",
                hub_home() / "partial",
                lambda done, size: session.report("fetching BIG-bench", done, size),
                SHA256,
            )
            store.put(partial, SHA256)
            partial.unlink()
    return store.path(SHA256)


def import_tasks(names: list[str], session: Session) -> tuple[list[str], list[str]]:
    """Import tasks of BIG-bench.

    Args:
        names: The names of tasks (`implicatures`), of sub-tasks
            (`natural_instructions/subtask046...`, which may be shortened to a unique beginning), or
            of families with all their sub-tasks. An empty list imports all tasks.
        session: The store, which keeps the archive, and the progress callback.

    Returns:
        The references of the imported tasks, and the omitted names with the reasons.

    Raises:
        NotFoundError: BIG-bench has no task with one of the names.
    """
    return import_archive(fetch_archive(session), names, session.report)


def reimport_from_archive(name: str, store: Store) -> None:
    """Replace a damaged task with the one in the archive.

    Args:
        name: The name of the task in BIG-bench.
        store: The store, which keeps the archive.

    Raises:
        NotFoundError: BIG-bench has no such task.
        IntegrityError: The archive gives other files than those that were imported before.
    """
    for found, load, _ in _iterate_tasks(fetch_archive(Session(store=store))):
        if found == name:
            write_task("bigbench", *convert(name, load()), renew=True)
            return
    raise NotFoundError(
        f"BIG-bench has no task {name!r}", f"remove the folder {tasks_folder() / 'bigbench' / name}"
    )


def import_archive(
    path: Path, names: list[str], report: Report = silent
) -> tuple[list[str], list[str]]:
    """Import tasks from a BIG-bench archive on disk.

    Args:
        path: The archive.
        names: The names of tasks, as for `import_tasks`.
        report: A progress callback.

    Returns:
        The references of the imported tasks, and the omitted names with the reasons.

    Raises:
        NotFoundError: The archive has no task with one of the names.
    """
    size = path.stat().st_size
    done: list[str] = []
    left_out: list[str] = []
    known: list[str] = []
    found: set[str] = set()
    for name, load, at in _iterate_tasks(path):
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
            f"BIG-bench has no task {missing[0]!r}",
            suggest_name(missing[0], known) or "import all: hub tasks import bigbench",
        )
    return done, left_out


def _iterate_tasks(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]], int]]:
    """Yield the name, a loader and the position of every task.json, in one pass over the archive."""
    with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|gz") as tar:
        for member in tar:
            found = re.search(r"/benchmark_tasks/(.+)/task\.json$", member.name)
            if found and member.isfile():
                file = cast(IO[bytes], tar.extractfile(member))
                yield found.group(1), partial(json.load, file), raw.tell()


def convert(name: str, content: dict[str, Any]) -> tuple[Card, list[Example]]:
    """Convert a task.json to a card and examples.

    The prompt is BIG-bench's own zero-shot prompt, stripped. The order of the choices depends only
    on their text, because in some tasks the right choice always comes first. A task with few
    different free answers uses them as choices.

    Args:
        name: The name of the task.
        content: The values of task.json.

    Returns:
        The card and the examples that have one right answer.

    Raises:
        HubError: No example has one right answer.
    """
    raw = [e for e in content.get("examples") or () if isinstance(e.get("input"), str)]
    labels = _find_labels(raw)
    examples = [e for e in (_convert_example(item, labels) for item in raw) if e is not None]
    if not examples:
        raise HubError("no example has exactly one right answer", "choose another task")
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


def _find_labels(raw: list[dict[str, Any]]) -> list[str] | None:
    """Return the sorted answers that all examples share, or None if they differ."""
    scored = [e["target_scores"] for e in raw if e.get("target_scores")]
    if scored:
        first = set(scored[0])
        same = all(set(s) == first for s in scored) and len(first) <= MAX_LABELS
        return sorted(c.strip() for c in first) if same else None
    targets = {t for e in raw for t in _list_targets(e)}
    return sorted(targets) if 2 <= len(targets) <= MAX_LABELS else None


def _list_targets(item: dict[str, Any]) -> list[str]:
    """Return the accepted free answers of an item, which has one text or a list of texts."""
    target = item.get("target")
    return [
        t.strip() for t in (target if isinstance(target, list) else [target]) if isinstance(t, str)
    ]


def _convert_example(item: dict[str, Any], labels: list[str] | None) -> Example | None:
    """Convert an item to an example, or return None if it has no single right answer."""
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
    targets = _list_targets(item)
    if not targets or not text:
        return None
    if labels:
        if len(targets) > 1:
            return None
        return Example(
            id=example_id(text, labels), input=text, choices=labels, answer=labels.index(targets[0])
        )
    return Example(id=example_id(text, ()), input=text, targets=targets)
