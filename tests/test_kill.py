"""SIGKILL at random moments and before every step, and full disks: what is stored stays whole.

Set HUB_KILLS for more kills per command and kind (2 by default; 200 are more than the steps of any
command), and use pytest -s to see how many of them met the command at work.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import killing
import pytest
from conftest import Ran, make_expert, run_hub
from experthub import hub
from experthub.hub import _yaml, leases
from experthub.hub.expert import Expert, Reference
from experthub.hub.lock import Lock
from experthub.hub.registry import Registry
from experthub.hub.store import Store
from experthub.hub.verification import verify
from hf_server import HfServer
from test_hygiene import flip
from test_push import FILES

Make = Callable[..., Path]
Words = Sequence[str | Path]
KILLS = int(os.environ.get("HUB_KILLS", "2"))
REPO = "alice/mine"


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


class Case:
    """A command that is killed, and what must hold then.

    again: the exit codes of the same command afterwards.
    """

    again: tuple[int, ...] = (0,)

    def __init__(self, folder: Path, base: Path, home: Path, server: HfServer) -> None:
        self.folder, self.base, self.home, self.server = folder, base, home, server
        self.made = 0
        self.begin()

    def expert(self, rank: int = 8) -> Path:
        """The folder of a new expert."""
        self.made += 1
        return make_expert(self.folder / f"made-{self.made}", self.base, self.made, rank=rank)

    def forget(self) -> None:
        """Begin anew, so that what there is to check does not grow."""
        for name in ("objects", "registry", "hf", "partial"):
            shutil.rmtree(self.home / name, ignore_errors=True)

    def begin(self) -> None:
        """Once."""

    def prepare(self, turn: int) -> Words:
        """Before each turn; returns the command."""
        raise NotImplementedError

    def killed(self) -> None:
        """After the kill."""

    def done(self) -> None:
        """After the same command was run again."""


def entry(name: str) -> Expert:
    return Registry.read().expert(Reference.parse(name))


class Add(Case):
    def prepare(self, turn: int) -> Words:
        if turn % 8 == 0:
            self.forget()
        self.name = f"e-{turn}"
        return ("add", self.expert(), "--name", self.name)

    def done(self) -> None:
        assert Store().identity(entry(self.name).digest)


class Pull(Case):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "e", "--registry", "registry.yaml")
        self.digest = entry("e").digest

    def prepare(self, turn: int) -> Words:
        self.forget()
        return ("pull", "e")

    def done(self) -> None:
        assert Store().identity(self.digest).digest == self.digest
        assert entry("e") in Registry.read().user.content.experts


class PullRemote(Pull):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "e")
        self.digest = entry("e").digest
        assert killing.run("push", "e", f"hf:{REPO}").code == 0

    def prepare(self, turn: int) -> Words:
        super().prepare(turn)
        return ("pull", f"hf:{REPO}")

    def done(self) -> None:
        super().done()
        assert not list((self.home / "partial").iterdir())


class Push(Case):
    def begin(self) -> None:
        self.before: list[str] = []
        assert killing.run(*self.prepare(0)).code == 0

    def prepare(self, turn: int) -> Words:
        if turn % 8 == 0:
            self.forget()
        assert run_hub("add", self.expert(), "--name", "e").code == 0
        if turn:
            self.before = self.commits()
        return ("push", "e", f"hf:{REPO}")

    def commits(self) -> list[str]:
        """The remote's commits, newest first; each has the files of one expert."""
        repository = self.server.store.repository(REPO)
        found = [str(c["id"]) for c in repository.history(repository.revision("main"))]
        for oid in found[:-1]:  # the first is empty
            files = {n: f for n, f in repository.files(oid).items() if n != ".gitattributes"}
            assert set(files) == FILES
            assert all(repository.content(file).is_file() for file in files.values())
        return found

    def killed(self) -> None:
        now = self.commits()
        assert now == self.before or now[1:] == self.before

    def done(self) -> None:
        now = self.commits()
        assert now[1:] == self.before, "one commit, however often it was tried"
        assert entry("e").sources[-1] == f"hf:{REPO}@{now[0]}"
        assert not list((self.home / "drafts").iterdir())


class Collect(Case):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "keep")
        self.keep = entry("keep").digest
        self.drop = [self.expert() for _ in range(6)]

    def prepare(self, turn: int) -> Words:
        for folder in self.drop:
            Store().add(folder)
        leases._mine.clear()  # this process needs nothing of it
        return ("gc", "--grace", "0", "--yes")

    def done(self) -> None:
        assert set(Store().objects()) == Store().identity(self.keep).objects
        assert not list((self.home / "trash").iterdir())
        assert not list((self.home / "leases").iterdir())


class Remove(Case):
    again = (0, 4)

    def begin(self) -> None:
        self.source = self.expert()

    def prepare(self, turn: int) -> Words:
        run_hub("add", self.source, "--name", "e")
        return ("rm", "e", "--yes")

    def done(self) -> None:
        assert run_hub("show", "e").code == 4
        assert not [p for p in (self.home / "registry").rglob("*") if p.is_file()]


class LockCase(Case):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "e")
        self.before: Lock | None = None

    def prepare(self, turn: int) -> Words:
        self.turn = turn
        recipe = {"base": str(self.base), "experts": ["e"], "merge": {"method": "linear"}}
        Path("recipe.yaml").write_text(_yaml.dump(recipe | {"seed": turn}))
        self.before = self.now()
        return ("lock", "recipe.yaml")

    def now(self) -> Lock | None:
        path = Path("recipe.lock.yaml")
        return Lock.read(path) if path.is_file() else None

    def killed(self) -> None:
        held = self.now()
        assert held == self.before or (held and held.seed == self.turn)
        if held:
            assert list((self.home / "roots").iterdir()), "what it pins is kept"

    def done(self) -> None:
        held = Lock.read(Path("recipe.lock.yaml"))
        assert hub.plan_of("recipe.yaml", "frozen").digest == held.composition
        assert sorted(p.name for p in Path().iterdir()) == ["recipe.lock.yaml", "recipe.yaml"]


class Repair(Case):
    def begin(self) -> None:
        for name in ("one", "two"):
            run_hub("add", self.expert(), "--name", name)

    def prepare(self, turn: int) -> Words:
        objects = Store().objects()
        self.flipped = random.sample(sorted(objects), 3)
        for sha256 in self.flipped:
            flip(objects[sha256])
        return ("verify", "--repair")

    def killed(self) -> None:
        found = verify()
        assert set(found.damaged) <= set(self.flipped)
        assert len(Store().objects()) == 7, "a damaged object stays until it is replaced"

    def done(self) -> None:
        assert verify().whole and len(Store().objects()) == 7


CASES = {
    "add": Add,
    "pull": Pull,
    "pull hf:": PullRemote,
    "push": Push,
    "gc": Collect,
    "rm": Remove,
    "lock": LockCase,
    "verify --repair": Repair,
}


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path: Path, base_folder: Path, home: Path, server: HfServer
) -> Case:
    made: Case = CASES[request.param](tmp_path, base_folder, home, server)
    # Imports and caches of this process, which its children begin with.
    for turn in (1, 2):
        run_hub(*made.prepare(turn))
    leases._mine.clear()
    return made


def nothing_left(home: Path, temporary: Path) -> None:
    assert not killing.left_behind(home, Path.cwd(), temporary)
    assert not list(temporary.iterdir())


def check(case: Case, words: Words, home: Path, temporary: Path) -> None:
    """What must hold after any kill, and after the same command once more."""
    case.killed()
    found = verify()
    whole = found.whole or isinstance(case, Repair)
    assert whole and not found.incomplete and not found.strangers
    assert killing.run(*words).code in case.again
    case.done()
    nothing_left(home, temporary)
    assert len(list((home / "leases").glob("*"))) <= 2, "this command's, and the next removes it"
    assert verify().whole


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
    assert killed, "none was killed in time"


def test_killed_before_every_step(case: Case, home: Path, temporary: Path) -> None:
    total = max(killing.run(*case.prepare(turn)).steps for turn in (10, 11))
    chosen = sorted({1 + number * total // KILLS for number in range(KILLS)})
    killed = 0
    for turn, step in enumerate(chosen, 100):
        words = case.prepare(turn)
        killed += killing.run(*words, before=step).killed
        check(case, words, home, temporary)
    print(f"\n{type(case).__name__}: killed before {killed} of {total} steps")
    assert killed >= len(chosen) - 2, "threads may need a step less"


def one_error(ran: Ran, code: int) -> None:
    """It says what is wrong, once, and what to do."""
    assert ran.code == code and not ran.out, (ran.code, ran.out)
    assert len(ran.lines("error: ")) == len(ran.lines("hint: ")) == 1, ran.err
    assert "Traceback" not in ran.err


def test_a_full_disk(case: Case, home: Path, tmp_path: Path, temporary: Path) -> None:
    """From some step on there is no room: one error, and nothing half-written."""
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


@pytest.mark.parametrize("limit", [0, 1, 500, 20_000])
def test_a_write_that_stops(
    limit: int, expert_folder: Make, home: Path, tmp_path: Path, temporary: Path
) -> None:
    folder = expert_folder(1, rank=16)
    words = ("add", folder, "--name", "e")
    ran = killing.run_full(tmp_path / "told", *words, limit=limit)
    one_error(ran, 1)
    assert "File too large" in ran.err
    nothing_left(home, temporary)
    assert verify().whole and run_hub("show", "e").code == 4
    assert killing.run(*words).code == 0
    assert Store().identity(entry("e").digest)
