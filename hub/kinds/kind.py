"""The type of a kind of experts, and the catalogue of all kinds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.kinds.broken_kind import report_broken_kind
from experthub.hub.kinds.footprint import BaseShapes, Footprint
from experthub.hub.kinds.stored_expert import StoredExpert

if TYPE_CHECKING:
    from experthub.merge import Delta

FILE = r"[a-z_]{1,60}(-[0-9]{5}-of-[0-9]{5})?\.(json|safetensors|safetensors\.index\.json)"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


Changes = Mapping[str, Callable[[], "Delta"]]


@dataclass(frozen=True)
class ExpertKind:
    """A kind of experts: its files, their checks, and how they change a base.

    Args:
        name: The name in registries and in `expert.json`.
        label: The name of one such expert in messages, with an article: `a LoRA`.
        marks: File names. A folder with one of them holds an expert of this kind.
        files: The names of all its files, as shell patterns. Every kind may also have gates.
        check: A function that checks the files of this kind in a folder and returns their names. It
            raises IntegrityError for files that could not be loaded later.
        companions: The names of files that `check` may return besides, which are not its own.
        key: The key of a recipe that names one such expert.
        footprint: A function that reads from headers what a stored expert changes. None for a kind
            that is not listed under `experts:`.
        load: A function of the opened files by name, the footprint and the base. It returns for
            each parameter a function that makes its change. None for a kind that is not one change
            of the weights.
        load_dense: As `load`, for the dense parts of low-rank experts.
        mapped: The files that `load` reads as a whole. It gets their bytes as an `mmap`.
        opened: Shell patterns of larger files. `load` gets their paths, and opens them itself.
        low_rank: Whether every change is low-rank.
        peft: Whether the files are an adapter that peft loads.
        base_name: A function that returns the name of the base that the files in a folder state.
    """

    name: str
    label: str
    marks: tuple[str, ...]
    files: tuple[str, ...]
    check: Callable[[Path], list[str]]
    companions: tuple[str, ...] = ()
    key: str = "experts"
    footprint: Callable[[StoredExpert], Footprint] | None = None
    load: Callable[[Mapping[str, Any], Footprint, BaseShapes], Changes] | None = None
    load_dense: Callable[[Mapping[str, Any], Footprint, BaseShapes], Changes] | None = None
    mapped: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    low_rank: bool = False
    peft: bool = False
    base_name: Callable[[Path], str | None] = lambda folder: None


class Kinds(Mapping[str, ExpertKind]):
    """The catalogue of kinds by name, in the order in which a folder is recognised.

    Other packages add kinds by the entry-point group `experthub.kinds`. They come after the
    built-in ones. They are imported when a name or a folder belongs to no known kind. Those that
    cannot be imported are reported and left out.
    """

    group = "experthub.kinds"

    def __init__(self) -> None:
        self._kinds: dict[str, ExpertKind] = {}
        self._plugins_loaded = False
        self.broken: dict[str, HubError] = {}

    def register(self, kind: ExpertKind) -> ExpertKind:
        """Add a kind to the catalogue.

        Args:
            kind: The kind.

        Returns:
            The same kind.

        Raises:
            ValueError: Another kind has the name or a mark, or a mark is not a file name that a
                store accepts.
        """
        if kind.name in self._kinds:
            raise ValueError(f"the kind {kind.name!r} is registered already")
        for mark in kind.marks:
            if not re.fullmatch(FILE, mark):
                raise ValueError(f"expected a file name that matches {FILE}, found {mark!r}")
            other = _find_marked({mark}, self._kinds.values())
            if other:
                raise ValueError(f"the file {mark} marks the kind {other.name!r} already")
        self._kinds[kind.name] = kind
        return kind

    def recognise(self, folder: Path) -> ExpertKind:
        """Find the kind of the expert in a folder.

        Args:
            folder: The folder.

        Returns:
            The first kind of which the folder has a mark.

        Raises:
            IntegrityError: The folder holds no expert, or only a pickle.
        """
        names = {path.name for path in folder.iterdir()}
        found = _find_marked(names, self._kinds.values()) or _find_marked(names, self.values())
        if found:
            return found
        pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
        if pickles:
            raise IntegrityError(
                f"{folder} holds {pickles[0]}, a pickle, and no safetensors",
                "save it again with safe_serialization=True: reading a pickle can run code",
            )
        wanted = " and no ".join(kind.marks[0] for kind in self.values() if kind.load)
        raise IntegrityError(
            f"{folder} holds no {wanted}",
            "name the folder that peft's save_pretrained wrote",
        )

    def _load_plugins(self) -> dict[str, ExpertKind]:
        """Import the kinds of other packages once, and return all that can be imported."""
        if not self._plugins_loaded:
            self._plugins_loaded = True  # A kind may read the catalogue while it is imported.
            self.broken.clear()
            for point in entry_points(group=self.group):
                before = dict(self._kinds)
                try:
                    point.load()
                except BaseException as error:
                    self._kinds = before  # Without what it registered before it failed.
                    if not isinstance(error, Exception | SystemExit):
                        self._plugins_loaded = False
                        raise
                    self.broken[point.name] = report_broken_kind(point, error)
        return self._kinds

    def __getitem__(self, name: str) -> ExpertKind:
        found = self._kinds.get(name) or self._load_plugins().get(name)
        if found is None:
            raise self.broken.get(name) or UsageError(
                f"unknown kind {short(name)}; known kinds: {', '.join(self)}",
                "install the package that adds this kind",
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._kinds or name in self._load_plugins()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load_plugins())

    def __len__(self) -> int:
        return len(self._load_plugins())


def _find_marked(names: set[str], known: Iterable[ExpertKind]) -> ExpertKind | None:
    """Return the first kind that has one of these names as a mark."""
    return next((kind for kind in known if names.intersection(kind.marks)), None)


kinds = Kinds()
