"""Commands in child processes that are killed: at some moment, or before a step on the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from conftest import run_hub
from experthub.hub import leases
from experthub.hub._files import DRAFT

FORK = multiprocessing.get_context("fork")
STEPS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STUCK = 120  # seconds


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, the steps that it began, and how long it took.

    working: the seconds from its first step on.
    """

    code: int
    steps: int
    seconds: float
    working: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def _count(step: Callable[[], None]) -> None:
    """Call `step` before everything that changes what is on the disk, in this process."""

    def hook(event: str, values: tuple[Any, ...]) -> None:
        opened = event == "open" and not str(values[0]).startswith("/dev/")
        if event in STEPS or (opened and isinstance(values[2], int) and values[2] & WRITING):
            step()

    sync = os.fsync

    def fsync(handle: int) -> None:
        step()
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def _child(words: tuple[Any, ...], ready: Any, begun: Any, steps: Any, stop: int) -> None:
    """The command, as a new process would run it."""
    leases._mine.clear()  # the parent's
    sys.dont_write_bytecode = True
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def step() -> None:
        steps.value += 1
        if steps.value == 1:
            begun.set()
        if steps.value == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    _count(step)
    ready.set()
    code = run_hub(*words).code
    begun.set()
    os._exit(code)


def _join(child: BaseProcess) -> None:
    child.join(STUCK)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError("a command is stuck")


def run(*words: Any, after: float | None = None, working: bool = False, before: int = 0) -> Ended:
    """Run a command in a child.

    after: seconds until it is killed, from its begin, or from its first step on the disk if it is
    to be `working`.  before: the step before which it is killed.
    """
    ready, begun, steps = FORK.Event(), FORK.Event(), FORK.Value("i", 0, lock=False)
    child = FORK.Process(target=_child, args=(words, ready, begun, steps, before))
    child.start()
    ready.wait(STUCK)
    start = time.perf_counter()
    if working or after is None:
        begun.wait(STUCK)
    first = time.perf_counter()
    if after is not None:
        time.sleep(after)
        child.kill()
    _join(child)
    assert child.exitcode is not None
    end = time.perf_counter()
    return Ended(child.exitcode, steps.value, end - start, end - first)


def left_behind(*folders: Path) -> list[str]:
    """The drafts below folders: what is to be there only while somebody writes."""
    return [str(p) for folder in folders for p in folder.rglob(".*") if DRAFT.fullmatch(p.name)]
