"""The lock file `<recipe>.lock.yaml`: its format, reading and writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from experthub.hub.errors import NotFoundError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import hub_home
from experthub.hub.files.yaml_files import Closed
from experthub.hub.formats.records import Digest, Sha256
from experthub.hub.recipes.plan import LOCK_VERSION, Plan
from experthub.hub.recipes.recipe import STATE_KEYS
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import make_source_absolute, make_source_relative
from experthub.hub.store.leases import hold_lease
from experthub.hub.store.roots import remember_lock
from pydantic import Field, StringConstraints, model_validator

SUFFIX = ".lock.yaml"
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]


class LockedBase(Closed):
    """The base in a lock: its name, its fingerprint and digest, and where to get it."""

    name: str
    fingerprint: Digest
    digest: Digest | None = None
    sources: Annotated[list[str], Field(min_length=1)]
    sha256: Sha256 | None = None
    commit: Commit | None = None


class LockedExpert(Closed):
    """An expert in a lock: its name, its digest, and where to get it."""

    expert: str
    digest: Digest
    sources: Annotated[list[str], Field(min_length=1)]
    task: str | None = None
    as_: Annotated[str | None, Field(alias="as")] = None
    weight: float = 1.0

    @property
    def content(self) -> Content:
        """The content that the entry pins."""
        return Content(self.expert, self.digest, tuple(self.sources), self.task)


class LockedMerge(Closed):
    """An expert in a lock that is a merge of experts."""

    merge: dict[str, Any]
    experts: Annotated[list[LockedExpert], Field(min_length=1)]
    rank: int | None = None
    as_: Annotated[str | None, Field(alias="as")] = None
    weight: float = 1.0


class LockedTask(Closed):
    """A task in a lock that a method learned from."""

    task: str
    digest: Digest


class LockedData(Closed):
    """The data in a lock that a method learned from; see `hub.recipes.entries.DataUse`."""

    tasks: Annotated[list[LockedTask], Field(min_length=1)]
    split: str
    labels: bool
    shots: int | None = None
    limit: int | None = None

    @property
    def use(self) -> dict[str, Any]:
        """The data as a recipe would set it."""
        rest = self.model_dump(exclude={"tasks"})
        return {"tasks": [task.task for task in self.tasks], **rest}


class Lock(Closed):
    """The file `<recipe>.lock.yaml`, version 2 or 1.

    Of the base, version 1 covers the weights only. Version 2 also covers its configuration, its
    tokenizer and its processors.

    Attributes:
        recipe: The digest of the recipe's values; comments and layout do not count.
        composition: The digest of the plan, which covers everything that changes the composed weights.
        encoders: The bases that embed texts for the method, by their names in the recipe.
    """

    version: Literal[1, 2]
    recipe: Digest
    composition: Digest
    base: LockedBase
    encoders: dict[str, LockedBase] | None = None
    experts: Annotated[list[LockedExpert | LockedMerge], Field(min_length=1)]
    merge: dict[str, Any] | None = None
    route: dict[str, Any] | None = None
    parts: list[dict[str, Any]] | None = None
    targets: str | None = None
    dtype: str
    seed: int
    allow_base_mismatch: bool
    data: LockedData | None = None
    coefficients: LockedExpert | None = None
    router: LockedExpert | None = None
    dense_parts: str | None = None

    @model_validator(mode="after")
    def _check_base(self) -> Lock:
        """Check that a lock of version 2 has the digest of its base."""
        if self.version == LOCK_VERSION and self.base.digest is None:
            raise ValueError("base needs a digest")
        return self

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock file, and make its sources absolute.

        Args:
            path: The file.

        Returns:
            The lock.

        Raises:
            NotFoundError: There is no such file.
            UsageError: The file is malformed; the message names the file and the line.
        """
        if not path.is_file():
            raise NotFoundError(f"there is no lock {path}", "run hub lock RECIPE to write it")
        lock = yaml_files.validate(cls, yaml_files.read(path), "docs/recipes.md")
        return lock._map_sources(lambda source: make_source_absolute(source, path.resolve().parent))

    @classmethod
    def of(cls, plan: Plan, recipe: str) -> Lock:
        """Make the lock of a plan.

        Args:
            plan: The plan.
            recipe: The digest of the recipe's values.

        Returns:
            The lock.
        """
        return cls.model_validate({**plan.lock, "recipe": recipe})

    def write(self, path: Path) -> None:
        """Write the file.

        Sources inside its folder are written relative to it, so that both can move.

        Args:
            path: The file.
        """
        near = self._map_sources(lambda source: make_source_relative(source, path.resolve().parent))
        # A collection between the two writes could delete the content.
        with hold_lease(hub_home()):
            remember_lock(path)
            checksummed_text.write(path, yaml_files.dump(near.record()))

    def record(self) -> dict[str, Any]:
        """Return the lock as plain values, for `--json` and for the file.

        Returns:
            The keys of the file.
        """
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @property
    def members(self) -> list[LockedExpert]:
        """The experts in the recipe's order, including the experts of nested merges."""
        groups = [[e] if isinstance(e, LockedExpert) else e.experts for e in self.experts]
        return [member for group in groups for member in group]

    def _map_sources(self, place: Callable[[str], str]) -> Lock:
        """Return the lock with every source rewritten."""

        def rewrite(entry: Any) -> Any:
            if isinstance(entry, LockedMerge):
                return entry.model_copy(update={"experts": list(map(rewrite, entry.experts))})
            return entry.model_copy(update={"sources": list(map(place, entry.sources))})

        update: dict[str, Any] = {
            "base": rewrite(self.base),
            "experts": list(map(rewrite, self.experts)),
        }
        if self.encoders:
            update["encoders"] = {name: rewrite(base) for name, base in self.encoders.items()}
        for key in STATE_KEYS:
            if getattr(self, key):
                update[key] = rewrite(getattr(self, key))
        return self.model_copy(update=update)


def lock_path(recipe: Path) -> Path:
    """Return the path of a recipe's lock: beside it, under its stem.

    Args:
        recipe: The recipe file.

    Returns:
        The path, whether it exists or not.
    """
    return recipe.with_name(recipe.stem + SUFFIX)
