"""SIGKILL at random moments: what is stored stays whole, and the next command finds its way.

Set HUB_KILLS for more rounds per command (10 by default).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub
from experthub import hub
from experthub.hub import _yaml
from experthub.hub.lock import Lock
from experthub.hub.registry import Registry
from experthub.hub.store import Store
from experthub.hub.verification import verify

Make = Callable[..., Path]
KILLS = int(os.environ.get("HUB_KILLS", "10"))
FORK = multiprocessing.get_context("fork")


def command(*words: Any) -> None:
    """A command in a child process; what it says is nobody's business."""
    from experthub.hub import leases

    leases._mine.clear()  # the parent's: a new process has its own
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    run_hub(*words)


def seconds(*words: Any) -> float:
    start = time.perf_counter()
    child = FORK.Process(target=command, args=words)
    child.start()
    child.join()
    return time.perf_counter() - start


def killed(limit: float, *words: Any) -> bool:
    """Whether the command was killed before it was done."""
    child = FORK.Process(target=command, args=words)
    child.start()
    time.sleep(random.uniform(0, limit))
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def check_whole(home: Path) -> None:
    """Nothing is damaged, and no file is left half-written."""
    found = verify()
    assert found.whole and not found.incomplete and not found.strangers
    assert not [p for p in home.rglob(".*") if p.is_file()]


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(os.environ.get("HUB_SEED", "0"))


def test_add(expert_folder: Make, home: Path) -> None:
    folders = [expert_folder(seed, rank=16) for seed in range(4)]
    limit = 1.1 * seconds("add", folders[0], "--name", "e")
    count = 0
    for turn in range(KILLS):
        folder = folders[turn % 4]
        count += killed(limit, "add", folder, "--name", f"e-{turn}")
        check_whole(home)
        assert run_hub("add", folder, "--name", f"e-{turn}").code == 0
        expert = Registry.read().expert(hub_reference(f"e-{turn}"))
        assert Store().identity(expert.digest)
    assert count, "none was killed in time"


def hub_reference(name: str) -> Any:
    from experthub.hub.expert import Reference

    return Reference.parse(name)


def test_pull(expert_folder: Make, home: Path) -> None:
    folder = expert_folder(1, rank=16)
    run_hub("add", folder, "--name", "e", "--registry", "registry.yaml")
    (digest,) = {e.digest for e in Registry.read().experts() if e.name == "e"}

    def forget() -> None:
        for path in Store().objects().values():
            path.unlink()

    forget()
    limit = 1.1 * seconds("pull", "e")
    count = 0
    for _ in range(KILLS):
        forget()
        count += killed(limit, "pull", "e")
        found = verify()
        assert found.whole and not found.strangers
        assert run_hub("pull", "e").code == 0
        check_whole(home)
        assert Store().identity(digest).digest == digest
    assert count


def test_gc(expert_folder: Make, home: Path) -> None:
    keep, drop = expert_folder(1, rank=16), [expert_folder(s, rank=16) for s in range(2, 8)]
    run_hub("add", keep, "--name", "keep")
    digest = Registry.read().expert(hub_reference("keep")).digest

    def litter() -> None:
        for folder in drop:
            Store().add(folder)

    command_words = ("gc", "--grace", "0", "--yes")
    from experthub.hub import leases

    litter()
    leases._mine.clear()
    limit = 1.1 * seconds(*command_words)
    count = 0
    for _ in range(KILLS):
        litter()
        leases._mine.clear()
        count += killed(limit, *command_words)
        check_whole(home)
        assert Store().identity(digest).digest == digest
        assert run_hub(*command_words).code == 0
        assert set(Store().objects()) == Store().identity(digest).objects
        assert not list((home / "trash").iterdir())
    assert count


def test_lock(expert_folder: Make, base_folder: Path, home: Path) -> None:
    run_hub("add", expert_folder(1), "--name", "e")
    recipe: dict[str, Any] = {"base": str(base_folder), "experts": ["e"]}
    path = Path("recipe.yaml")

    def write(weight: float) -> None:
        path.write_text(_yaml.dump(recipe | {"merge": {"method": "linear"}, "seed": int(weight)}))

    write(0)
    limit = 1.1 * seconds("lock", "recipe.yaml")
    count = 0
    for turn in range(1, KILLS + 1):
        write(turn)
        before = Lock.read(Path("recipe.lock.yaml"))
        count += killed(limit, "lock", "recipe.yaml")
        held = Lock.read(Path("recipe.lock.yaml"))
        assert held == before or held.seed == turn
        check_whole(home)
        assert run_hub("lock", "recipe.yaml").code == 0
        assert hub.plan_of(path, "frozen").digest == Lock.read(Path("recipe.lock.yaml")).composition
        assert sorted(p.name for p in Path().glob("*recipe*")) == ["recipe.lock.yaml", path.name]
        assert not list(Path().glob(".*"))
    assert count
