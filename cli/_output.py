"""Words out: tables and JSON on standard output, progress and messages on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experthub.hub.progress import Report
    from experthub.hub.recipes.lock import Pins

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print names only, one per line.")]
RegistryOption = Annotated[
    Path | None,
    typer.Option("--registry", metavar="FILE", help="A registry.yaml to look in first."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, mps.")
]
LockedOption = Annotated[
    bool, typer.Option("--locked", help="Use what the lock pins; refuse a stale one.")
]
FrozenOption = Annotated[
    bool, typer.Option("--frozen", help="Use what the lock pins, without asking a registry.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
SECONDS_BETWEEN_LINES = 10.0


def pins_of(locked: bool, frozen: bool) -> Pins | None:
    """What --locked and --frozen ask for; UsageError for both."""
    if locked and frozen:
        from experthub.hub.errors import UsageError

        raise UsageError("--locked and --frozen exclude each other", "--frozen asks no registry")
    return "locked" if locked else "frozen" if frozen else None


def print_json(value: dict[str, Any], compact: bool = False) -> None:
    """One JSON document with the schema's number at its top; compact: on one line, for many numbers."""
    indent = None if compact else 2
    sys.stdout.write(json.dumps({"schema": 1, **value}, indent=indent, ensure_ascii=False) + "\n")


def plain(text: str) -> str:
    """Text of anybody's without what moves a cursor, colours or hides: that is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_lines(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table as wide as it needs to be; columns named with a leading '>' are aligned right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left")
    for row in rows:
        table.add_row(*map(plain, row))
    width = None if sys.stdout.isatty() else 1000  # a pipe has no width to fit
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)
    console.print(table)


def print_fields(fields: dict[str, str]) -> None:
    """Names and values, aligned."""
    width = max(map(len, fields), default=0)
    print_lines([f"{name:<{width}}  {plain(value)}" for name, value in fields.items() if value])


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def say(message: str) -> None:
    """A message to the person at the terminal."""
    sys.stderr.write(message + "\n")


@contextmanager
def progress() -> Iterator[Report]:
    """A report that shows a bar on a terminal, and a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, size: int) -> None:
            if what.startswith("note: "):  # it stays when the bars are gone
                bars.console.print(what, markup=False, highlight=False)
                return
            if what not in tasks:
                for old in tasks.values():
                    bars.update(old, visible=False)
                tasks[what] = bars.add_task(what, total=size or None, count="")
            bars.update(tasks[what], completed=done, total=size or None, count=_count(done, size))

        yield show


class _Lines:
    """What is done, and every few seconds how far it is."""

    def __init__(self) -> None:
        self.what = ""
        self.last = 0.0

    def __call__(self, what: str, done: int, size: int) -> None:
        now = time.monotonic()
        if what == self.what and (now - self.last < SECONDS_BETWEEN_LINES or not size):
            return
        self.what, self.last = what, now
        say(f"{what} {_count(done, size)}".rstrip())


def _count(done: int, size: int) -> str:
    if not size:
        return ""
    if size >= 10 << 20:
        return f"{done >> 20}/{size >> 20} MiB"
    return f"{done}/{size}"
