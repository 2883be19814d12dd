"""Eight users of one store, who do everything at random: nothing is lost, and nobody is stuck.

Set HUB_STRESS for more seconds (6 by default).  Each command is a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import killing
import pytest
from conftest import Ran, make_expert, run_hub
from experthub.hub.errors import HubError
from experthub.hub.files import yaml_files
from experthub.hub.maintenance.verification import verify
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store import leases
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store

SECONDS = float(os.environ.get("HUB_STRESS", "6"))
USERS, CONTENTS, SHARED = 8, 3, 2
NAMES = ("mine", "my-own", "my-other")
# An expert is stored for some time before it is registered if it is compared with peft between.
PROOFS = ((), *[("--no-proof",)] * 4)
WORDS = ("Traceback", "Errno", "Exception")  # that no user is to see


class User:
    """One who has names, contents and a lock of its own, and shares others.

    folders: of the contents that all share, and of two more.
    """

    def __init__(self, number: int, folders: Sequence[Path], base: Path) -> None:
        self.number, self.folders, self.base = number, folders, base
        self.random = random.Random(f"{os.environ.get('HUB_SEED', '0')}/{number}")
        self.digests = [read_folder(folder).digest for folder in folders]
        self.mine: dict[str, set[str]] = {f"{name}-{number}": set() for name in NAMES}
        self.locked: str | None = None
        self.wrong: list[str] = []
        self.count: Counter[str] = Counter()
        self.folder = Path(f"user-{number}")
        self.folder.mkdir()

    def hub(self, codes: Sequence[int], *words: str | Path) -> Ran:
        """A command in a process of its own; an exit code that it may not have is noted."""
        told = self.folder / "told.json"
        told.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            killing.begin_child()
            ran = run_hub(*words)
            told.write_text(json.dumps([ran.code, ran.out, ran.err]))
            os._exit(0)
        until = time.monotonic() + killing.STUCK
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                raise AssertionError(f"{words} is stuck")
            time.sleep(0.002)
        assert ended == (child, 0), f"{words} ended with {os.waitstatus_to_exitcode(ended[1])}"
        ran = Ran(*json.loads(told.read_text()))
        self.count[f"{words[0]} {ran.code}"] += 1
        if ran.code not in codes or any(word in ran.err for word in WORDS):
            self.wrong.append(f"{' '.join(map(str, words))}: {ran.code} {ran.err}")
        return ran

    def begin(self) -> None:
        """Store, remove and collect an expert that nobody else has."""
        self.add_mine("mine", CONTENTS)
        self.check()
        self.remove_mine("mine")
        self.hub([0], "gc", "--grace", "0", "--yes")
        assert self.wrong or self.digests[CONTENTS].removeprefix("sha256:") not in Store()

    def add_mine(self, name: str = "", which: int | None = None) -> None:
        name = f"{name or self.random.choice(NAMES)}-{self.number}"
        which = self.random.randrange(len(self.folders)) if which is None else which
        proof = self.random.choice(PROOFS)
        if self.hub([0], "add", self.folders[which], "--name", name, *proof).code == 0:
            self.mine[name].add(self.digests[which])

    def remove_mine(self, name: str = "") -> None:
        name = f"{name or self.random.choice(NAMES)}-{self.number}"
        code = 0 if self.mine[name] else 4
        if self.hub([code], "rm", name, "--yes").code == 0:
            self.mine[name].clear()

    def add_shared(self) -> None:
        name, proof = f"shared-{self.random.randrange(SHARED)}", self.random.choice(PROOFS)
        folder = self.random.choice(self.folders[:CONTENTS])
        self.hub([0, 6], "add", folder, "--name", name, *proof)

    def remove_shared(self) -> None:
        self.hub([0, 4], "rm", f"shared-{self.random.randrange(SHARED)}", "--yes")

    def pull(self) -> None:
        self.hub([0], "pull", f"known-{self.random.randrange(CONTENTS)}")

    def forget(self) -> None:
        """Remove an expert; one that only the project's registry has is a usage error."""
        self.hub([0, 2], "rm", f"known-{self.random.randrange(CONTENTS)}", "--yes")

    def collect(self) -> None:
        grace = self.random.choice(["0", "0.05"])
        self.hub([0], "gc", "--grace", grace, "--yes")

    def verify(self) -> None:
        self.hub([0], "verify", *self.random.choice([[], ["--repair"]]))

    def look(self) -> None:
        self.hub([0], self.random.choice(["list", "du"]))

    def compose(self) -> None:
        mine = [name for name, digests in self.mine.items() if digests]
        names = [*mine, "known-0", "known-1"]
        self.hub([0], "compose", self.recipe("plan.yaml", self.random.sample(names, 2)))
        self.hub([0, 4], "compose", self.recipe("plan.yaml", ["shared-0"]))

    def lock(self) -> None:
        which = self.random.randrange(CONTENTS)
        if not self.locked:
            self.recipe("recipe.yaml", [f"known-{which}"])
        if self.hub([0], "lock", self.folder / "recipe.yaml").code == 0:
            self.locked = self.locked or self.digests[which]

    def use_lock(self) -> None:
        if self.locked:
            self.hub([0], "compose", self.folder / "recipe.yaml", "--frozen")

    def recipe(self, name: str, experts: list[str]) -> Path:
        recipe = {"base": str(self.base), "experts": experts, "merge": {"method": "linear"}}
        (self.folder / name).write_text(yaml_files.dump(recipe))
        return self.folder / name

    def check(self) -> None:
        """Check that the user's own content is there, whatever the others do."""
        known, store = Registry.read().user.content.experts, Store()
        for name, digests in self.mine.items():
            found = {e.digest for e in known if e.name == name}
            if found != digests:
                self.wrong.append(f"{name} is {found}, and not {digests}")
        for digest in {d for digests in self.mine.values() for d in digests} | {self.locked}:
            try:
                assert not digest or store.read_identity(digest)
            except HubError as error:
                self.wrong.append(f"lost: {error.message}")

    def live(self, until: float) -> User:
        actions: list[Callable[[], None]] = [
            *[self.add_mine, self.remove_mine, self.collect] * 2,
            *[
                self.pull,
                self.add_shared,
                self.remove_shared,
                self.forget,
                self.verify,
                self.look,
                self.compose,
                self.lock,
                self.use_lock,
            ],
        ]
        self.begin()
        while time.time() < until and not self.wrong:
            self.random.choice(actions)()
            self.check()
        return self


@pytest.fixture
def folders(tmp_path: Path, base_folder: Path) -> list[Path]:
    """Contents; a registry in the current folder knows those that all share."""
    count = CONTENTS + 2 * USERS
    made = [make_expert(tmp_path / f"e-{n}", base_folder, n, rank=2) for n in range(count)]
    for number, folder in enumerate(made[:CONTENTS]):
        words = ("add", folder, "--name", f"known-{number}", "--registry", "registry.yaml")
        assert run_hub(*words).code == 0
    return made


def test_users_of_one_store(folders: list[Path], base_folder: Path, home: Path) -> None:
    own = [folders[CONTENTS + 2 * n :][:2] for n in range(USERS)]
    users = [User(n, [*folders[:CONTENTS], *own[n]], base_folder) for n in range(USERS)]
    run_hub("compose", users[0].recipe("plan.yaml", ["known-0"]))  # imports, for the children
    run_hub("verify")
    run_hub("gc", "--yes")
    leases._own_leases.clear()
    until = time.time() + SECONDS
    context = killing.FORK
    with ProcessPoolExecutor(USERS, mp_context=context) as pool:
        users = [f.result() for f in [pool.submit(user.live, until) for user in users]]
    count = sum((user.count for user in users), Counter[str]())
    print("\n", sum(count.values()), "commands:", sorted(count.items()))
    assert [line for user in users for line in user.wrong] == []
    for user in users:
        user.check()
        assert not user.wrong
    found = verify(Session())
    assert found.whole and not found.incomplete and not found.strangers
    assert run_hub("gc", "--grace", "0", "--yes").code == 0
    leases._own_leases.clear()
    for user in users:
        user.check()
        user.use_lock()
        assert not user.wrong
    known = {e.digest for layer in Registry.read().layers for e in layer.content.experts}
    known |= {user.locked for user in users if user.locked}
    identities = [Store().find_identity(digest) for digest in known]
    kept = {sha256 for identity in identities if identity for sha256 in identity.objects}
    assert set(Store().list_objects()) == kept and not list((home / "trash").iterdir())
    assert not killing.left_behind(home, Path.cwd())
    assert Registry.read().find_expert(Reference.parse("known-0"))
