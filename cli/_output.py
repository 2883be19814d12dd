"""Output of commands: results on standard output, progress and messages on standard error."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.files.digests import encode_json
from experthub.hub.files.safe_text import escape, escape_block, escape_json

if TYPE_CHECKING:
    from experthub.hub.progress import Report
    from experthub.hub.recipes.lock import Pins

SECONDS_BETWEEN_LINES = 10.0
WHOLE_NAMES = 40  # characters; longer names in the first column of a table may be cut


def choose_pins(locked: bool, frozen: bool) -> Pins | None:
    """Return the use of the lock that `--locked` and `--frozen` request.

    Args:
        locked: Whether `--locked` is set.
        frozen: Whether `--frozen` is set.

    Returns:
        `locked`, `frozen`, or None if neither is set.

    Raises:
        UsageError: Both are set.
    """
    if locked and frozen:
        from experthub.hub.errors import UsageError

        raise UsageError(
            "--locked and --frozen exclude each other",
            "use --frozen alone to read no registry, or --locked alone to check the registries",
        )
    return "locked" if locked else "frozen" if frozen else None


def open_streams() -> None:
    """Open the standard streams that the caller closed, and let no character stop the output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Drop the output that cannot be written, so that Python does not try again when it exits."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: dict[str, Any], compact: bool = False) -> None:
    """Print one JSON document with the version of its schema at the top.

    Args:
        value: The document.
        compact: Print it on one line.

    Raises:
        IntegrityError: A number is NaN or infinite. Nothing is printed.
    """
    indent = None if compact else 2
    text = encode_json({"schema": 1, **value}, indent=indent)
    sys.stdout.write(escape_json(text) + "\n")


def print_lines(lines: Sequence[str]) -> None:
    """Print lines on standard output, without control characters.

    Args:
        lines: The lines.
    """
    sys.stdout.write("".join(f"{escape(line)}\n" for line in lines))


def print_text(text: str) -> None:
    """Print a text of several lines, without control characters if a terminal shows it.

    Args:
        text: The text. A file or a pipe gets it as it is.
    """
    sys.stdout.write((escape_block(text) if sys.stdout.isatty() else text) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is as wide as its cells.

    Args:
        columns: The headers; a leading `>` aligns the column on the right.
        rows: The cells, row by row.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        right = column.startswith(">")
        # Names stand in the first column. They are copied into commands, so they stay whole.
        whole = place == 0 and all(len(row[0]) <= WHOLE_NAMES for row in rows)
        header = escape(column.removeprefix(">"))
        table.add_column(header, justify="right" if right else "left", no_wrap=whole)
    for row in rows:
        table.add_row(*map(escape, row))
    width = None if sys.stdout.isatty() else 1000  # Lines in a pipe are never wrapped.
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)
    console.print(table)


def print_fields(fields: dict[str, str]) -> None:
    """Print names and values in two columns, without empty values.

    Args:
        fields: Name -> value.
    """
    width = max(map(len, fields), default=0)
    print_lines([f"{name:<{width}}  {value}" for name, value in fields.items() if value])


def format_megabytes(size: int) -> str:
    """Format a number of bytes in megabytes.

    Args:
        size: The number of bytes.

    Returns:
        The text, such as `1.5 MB`.
    """
    return f"{size / 1e6:.1f} MB"


def print_message(message: str) -> None:
    """Print a message of one line for the user on standard error, without control characters.

    Args:
        message: The message.
    """
    sys.stderr.write(escape(message) + "\n")


def ask(question: str) -> bool:
    """Ask the user a question on the terminal.

    Args:
        question: The question.

    Returns:
        True if the answer is yes. False for any other answer, or without a terminal.
    """
    if not sys.stdin.isatty():
        return False
    print_message(f"{question} [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def show_progress() -> Iterator[Report]:
    """Open a progress callback that shows bars on a terminal, and occasional lines elsewhere.

    Yields:
        The callback.
    """
    if not sys.stderr.isatty():
        yield _ProgressLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, size: int) -> None:
            what = escape(what)
            if what.startswith("note: "):  # A note stays when the bars are gone.
                bars.console.print(what, markup=False, highlight=False)
                return
            if what not in tasks:
                for old in tasks.values():
                    bars.update(old, visible=False)
                tasks[what] = bars.add_task(what, total=size or None, count="")
            bars.update(
                tasks[what], completed=done, total=size or None, count=_format_count(done, size)
            )

        yield show


class _ProgressLines:
    """A progress callback that prints each new activity, and its count every few seconds."""

    def __init__(self) -> None:
        self.what = ""
        self.last = 0.0

    def __call__(self, what: str, done: int, size: int) -> None:
        now = time.monotonic()
        if what == self.what and (now - self.last < SECONDS_BETWEEN_LINES or not size):
            return
        self.what, self.last = what, now
        print_message(f"{what} {_format_count(done, size)}".rstrip())


def _format_count(done: int, size: int) -> str:
    """Format a count; sizes from 10 MiB are bytes."""
    if not size:
        return ""
    if size >= 10 << 20:
        return f"{done >> 20}/{size >> 20} MiB"
    return f"{done}/{size}"
