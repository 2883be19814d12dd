"""Commands in child processes that are killed, at some moment or before a step on the disk, or find it full."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from conftest import Ran, run_hub
from experthub.hub.files.atomic import DRAFT
from experthub.hub.store import leases

FORK = multiprocessing.get_context("fork")
STEPS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FULL = {"open", "os.link", "os.mkdir", "os.fsync"}  # the steps that need room
STUCK = 120  # seconds


@dataclass(frozen=True)
class Ended:
    """The end of a child: its exit code, the steps that it began, and the time that it took.

    working: the seconds from its first step on.
    """

    code: int
    steps: int
    seconds: float
    working: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def _count(step: Callable[[str], None]) -> None:
    """Call `step` before everything that changes what is on the disk, in this process."""

    def hook(event: str, values: tuple[Any, ...]) -> None:
        opened = event == "open" and not str(values[0]).startswith("/dev/")
        if event in STEPS or (opened and isinstance(values[2], int) and values[2] & WRITING):
            step(event)

    sync = os.fsync

    def fsync(handle: int) -> None:
        step("os.fsync")
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def begin_child() -> None:
    """Let a forked process begin as a new one would: without what belongs to its parent.

    The threads of torch do not survive a fork. A child that computes on more than one thread would
    wait for them for ever, or end with SIGSEGV in an attention, which finds no memory for them.
    """
    leases._own_leases.clear()
    torch.set_num_threads(1)


def _child(words: tuple[Any, ...], ready: Any, begun: Any, steps: Any, stop: int) -> None:
    """The command, as a new process would run it."""
    begin_child()
    sys.dont_write_bytecode = True
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def step(_: str) -> None:
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


def run_full(told: Path, *words: Any, after: int = 1 << 30, limit: int = -1) -> Ran:
    """Run a command in a child whose disk is full.

    told: a file for what it says.  after: steps that need room, and get it.  limit: bytes that a
    file may have.
    """

    def child() -> None:
        begin_child()
        sys.dont_write_bytecode = True
        left = after

        def step(event: str) -> None:
            nonlocal left
            left -= event in FULL
            if left < 0 and event in FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        _count(step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        ran = run_hub(*words)
        left = 1 << 30
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        told.write_text(json.dumps([ran.code, ran.out, ran.err]))
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    _join(process)
    return Ran(*json.loads(told.read_text()))


def left_behind(*folders: Path) -> list[str]:
    """The drafts below folders: what is to be there only while somebody writes."""
    return [str(p) for folder in folders for p in folder.rglob(".*") if DRAFT.fullmatch(p.name)]
