"""Commands that are killed, and what must hold then and after the next command."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import killing
from conftest import make_expert, run_hub
from experthub import hub
from experthub.hub.files import yaml_files
from experthub.hub.maintenance.verification import verify
from experthub.hub.recipes.lock_file import Lock
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store import leases
from experthub.hub.store.store import Store
from hf_server import HfServer
from test_hygiene import flip
from test_push import FILES

Words = Sequence[str | Path]
REPO = "alice/mine"
NO_PROOF = ("--no-proof",)  # A proof takes most of the time of an add, and writes nothing.


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
    return Registry.read().find_expert(Reference.parse(name))


class Add(Case):
    proof = False

    def prepare(self, turn: int) -> Words:
        if turn % 8 == 0:
            self.forget()
        self.name = f"e-{turn}"
        return ("add", self.expert(), "--name", self.name, *(() if self.proof else NO_PROOF))

    def killed(self) -> None:
        known = [e.name for e in Registry.read().user.content.experts]
        if self.name in known:
            self.done()

    def done(self) -> None:
        added = entry(self.name)
        assert Store().read_identity(added.digest).digest == added.digest
        assert (added.proof is not None) == self.proof, "the entry is written once, and whole"


class AddProved(Add):
    """The expert is compared with peft after it is stored, and before it is registered."""

    proof = True


class Pull(Case):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "e", "--registry", "registry.yaml", *NO_PROOF)
        self.digest = entry("e").digest

    def prepare(self, turn: int) -> Words:
        self.forget()
        return ("pull", "e")

    def done(self) -> None:
        assert Store().read_identity(self.digest).digest == self.digest
        assert entry("e") in Registry.read().user.content.experts


class PullRemote(Pull):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "e", *NO_PROOF)
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
        assert run_hub("add", self.expert(), "--name", "e", *NO_PROOF).code == 0
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
        assert not list(self.home.glob("drafts/*"))


class Collect(Case):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "keep", *NO_PROOF)
        self.keep = entry("keep").digest
        self.drop = [self.expert() for _ in range(6)]

    def prepare(self, turn: int) -> Words:
        for folder in self.drop:
            Store().add(folder)
        leases._own_leases.clear()  # this process needs nothing of it
        return ("gc", "--grace", "0", "--yes")

    def done(self) -> None:
        assert set(Store().list_objects()) == Store().read_identity(self.keep).objects
        assert not list((self.home / "trash").iterdir())
        assert not list((self.home / "leases").iterdir())


class Remove(Case):
    again = (0, 4)

    def begin(self) -> None:
        self.source = self.expert()

    def prepare(self, turn: int) -> Words:
        run_hub("add", self.source, "--name", "e", *NO_PROOF)
        return ("rm", "e", "--yes")

    def done(self) -> None:
        assert run_hub("show", "e").code == 4
        assert not [p for p in (self.home / "registry").rglob("*") if p.is_file()]


class LockCase(Case):
    def begin(self) -> None:
        run_hub("add", self.expert(), "--name", "e", *NO_PROOF)
        self.before: Lock | None = None

    def prepare(self, turn: int) -> Words:
        self.turn = turn
        recipe = {"base": str(self.base), "experts": ["e"], "merge": {"method": "linear"}}
        Path("recipe.yaml").write_text(yaml_files.dump(recipe | {"seed": turn}))
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
            run_hub("add", self.expert(), "--name", name, *NO_PROOF)

    def prepare(self, turn: int) -> Words:
        objects = Store().list_objects()
        self.flipped = random.sample(sorted(objects), 3)
        for sha256 in self.flipped:
            flip(objects[sha256])
        return ("verify", "--repair")

    def killed(self) -> None:
        found = verify(Session())
        assert set(found.damaged) <= set(self.flipped)
        assert len(Store().list_objects()) == 7, "a damaged object stays until it is replaced"

    def done(self) -> None:
        assert verify(Session()).whole and len(Store().list_objects()) == 7


CASES = {
    "add": Add,
    "add with a proof": AddProved,
    "pull": Pull,
    "pull hf:": PullRemote,
    "push": Push,
    "gc": Collect,
    "rm": Remove,
    "lock": LockCase,
    "verify --repair": Repair,
}
