"""SIGKILL at random moments and before every step, and full disks: what is stored stays whole.

Set HUB_KILLS for more kills per command and kind (2 by default; 200 are more than the steps of any
command), and use pytest -s to see how many of them met the command at work.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import killing
import pytest
from conftest import Ran, run_hub
from experthub.hub.maintenance.verification import verify
from experthub.hub.session import Session
from experthub.hub.store import leases
from experthub.hub.store.store import Store
from hf_server import HfServer
from kill_cases import CASES, NO_PROOF, Case, Repair, Words, entry

Make = Callable[..., Path]
KILLS = int(os.environ.get("HUB_KILLS", "2"))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, in which nothing is to stay."""
    random.seed(os.environ.get("HUB_SEED", "0"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield made


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path: Path, base_folder: Path, home: Path, server: HfServer
) -> Case:
    made: Case = CASES[request.param](tmp_path, base_folder, home, server)
    # Imports and caches of this process, which its children begin with.
    for turn in (1, 2):
        run_hub(*made.prepare(turn))
    leases._own_leases.clear()
    return made


def nothing_left(home: Path, temporary: Path) -> None:
    assert not killing.left_behind(home, Path.cwd(), temporary)
    assert not list(temporary.iterdir())


def check(case: Case, words: Words, home: Path, temporary: Path) -> None:
    """Check the state after a kill, and after the same command once more."""
    case.killed()
    found = verify(Session())
    whole = found.whole or isinstance(case, Repair)
    assert whole and not found.incomplete and not found.strangers
    assert killing.run(*words).code in case.again
    case.done()
    nothing_left(home, temporary)
    assert len(list((home / "leases").glob("*"))) <= 2, "this command's, and the next removes it"
    assert verify(Session()).whole


@pytest.mark.sampled(5)
def test_killed_at_some_moment(case: Case, home: Path, temporary: Path) -> None:
    """Every other kill is within the time from the first step on, the others within all the time."""
    whole = [killing.run(*case.prepare(turn)) for turn in range(10, 13)]
    limits = [sorted(w.seconds for w in whole)[1], sorted(w.working for w in whole)[1]]
    killed = between = 0
    for turn in range(KILLS):
        words = case.prepare(100 + turn)
        after = limits[turn % 2] * (turn + random.random()) / KILLS
        ended = killing.run(*words, after=after, working=turn % 2 == 1)
        killed += ended.killed
        between += ended.killed and 0 < ended.steps < whole[0].steps
        check(case, words, home, temporary)
    print(f"\n{type(case).__name__}: {killed} of {KILLS} killed, {between} between two steps")
    # Of a few kills all may come too late, if the machine was slower while the time was measured.
    assert killed or KILLS < 20, "none was killed in time"


@pytest.mark.sampled(5)
def test_killed_before_every_step(case: Case, home: Path, temporary: Path) -> None:
    total = max(killing.run(*case.prepare(turn)).steps for turn in (10, 11))
    chosen = sorted({1 + number * total // KILLS for number in range(KILLS)})
    killed = 0
    for turn, step in enumerate(chosen, 100):
        words = case.prepare(turn)
        killed += killing.run(*words, before=step).killed
        check(case, words, home, temporary)
    print(f"\n{type(case).__name__}: killed before {killed} of {total} steps")
    fewer = max(2, len(chosen) // 10)
    assert killed >= len(chosen) - fewer, "threads may need a step less, and so may other damage"


def one_error(ran: Ran, code: int) -> None:
    """It says what is wrong, once, and what to do."""
    assert ran.code == code and not ran.out, (ran.code, ran.out)
    assert len(ran.lines("error: ")) == len(ran.lines("hint: ")) == 1, ran.err
    assert "Traceback" not in ran.err


@pytest.mark.sampled(5)
def test_a_full_disk(case: Case, home: Path, tmp_path: Path, temporary: Path) -> None:
    """The disk is full from some step on: there is one error, and nothing half-written."""
    total = killing.run(*case.prepare(10)).steps
    failed = 0
    for turn, step in enumerate(sorted({number * total // KILLS for number in range(KILLS)})):
        words = case.prepare(100 + turn)
        ran = killing.run_full(tmp_path / "told", *words, after=step)
        if ran.code:
            failed += 1
            one_error(ran, 1)
            assert "No space left" in ran.err
        nothing_left(home, temporary)
        check(case, words, home, temporary)
    assert failed


@pytest.mark.parametrize("proof", [(), NO_PROOF], ids=["proof", "no proof"])
@pytest.mark.parametrize("limit", [0, 1, 500, 20_000])
def test_a_write_that_stops(
    limit: int, proof: Words, expert_folder: Make, home: Path, tmp_path: Path, temporary: Path
) -> None:
    folder = expert_folder(1, rank=16)
    words = ("add", folder, "--name", "e", *proof)
    ran = killing.run_full(tmp_path / "told", *words, limit=limit)
    one_error(ran, 1)
    assert "File too large" in ran.err
    nothing_left(home, temporary)
    assert verify(Session()).whole and run_hub("show", "e").code == 4
    assert killing.run(*words).code == 0
    assert Store().read_identity(entry("e").digest)
    assert (entry("e").proof is None) == bool(proof)
