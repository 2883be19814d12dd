"""The type of a kind of experts, and the catalogue of all kinds."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TypeVar

from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.formats.adapter import Adapted, check_shapes
from experthub.hub.formats.added_tokens import (
    EXPERT_TOKENIZER,
    MAX_ADDED,
    NewToken,
    read_added_tokens,
)
from experthub.hub.kinds.broken_kind import report_broken_kind
from experthub.hub.kinds.footprint import BaseShapes, Footprint, Shapes

if TYPE_CHECKING:
    from experthub.merge import Delta

FILE = r"[a-z_]{1,60}(-[0-9]{5}-of-[0-9]{5})?\.(json|safetensors|safetensors\.index\.json)"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredExpert:
    """A stored expert together with the base that it is checked against.

    Args:
        name: The name of the expert in errors.
        files: The names of its files.
        base: The base.
        locate: A function that returns the path of a file. The bytes are not verified; they are when
            the changes are loaded.
        verify: A function that hashes a file and returns its path.
        memo: The results of `compute_once` for this base.
        list_vocabulary: A function that returns the base's parameters whose rows are tokens.
    """

    name: str
    files: Collection[str]
    base: BaseShapes
    locate: Callable[[str], Path]
    verify: Callable[[str], Path]
    memo: dict[int, tuple[object, Any]]
    list_vocabulary: Callable[[], Collection[str]] = frozenset

    def compute_once(self, of: object, compute: Callable[[], Result]) -> Result:
        """Compute a function of an object once, if many experts share the object.

        The readers of headers return one object for equal headers, so a thousand experts of equal
        shapes are checked once.

        Args:
            of: The shared object. It is compared by identity.
            compute: A function that returns the result.

        Returns:
            The result of the first call with this object.
        """
        if id(of) not in self.memo:
            self.memo[id(of)] = of, compute()
        found: Result = self.memo[id(of)][1]
        return found

    def read_tokens(self) -> tuple[NewToken, ...]:
        """Read the tokens that the expert's tokenizer has beside its vocabulary.

        Returns:
            The tokens, in the order of their ids; none for an expert without such files.

        Raises:
            IntegrityError: A file is malformed.
        """
        files = {file: self.verify(file) for file in EXPERT_TOKENIZER if file in self.files}
        return read_added_tokens(files, self.name) if files else ()

    def fits_vocabulary(self, parameter: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a parameter differs from the base's in the number of its tokens only.

        Args:
            parameter: The name of the parameter.
            shape: Its shape in the expert.

        Returns:
            True if both have tokens as rows and are equal in the other dimensions.
        """
        own = self.base.shapes.get(parameter)
        if own is None or shape[1:] != own[1:] or not 0 < shape[0] <= own[0] + MAX_ADDED:
            return False
        return parameter in self.list_vocabulary()

    def check_low_rank(self, adapted: tuple[Adapted, ...]) -> Shapes:
        """Check low-rank changes against the base.

        Args:
            adapted: The changes of modules.

        Returns:
            The shape of each parameter that the expert changes.

        Raises:
            HubError: The base lacks a module, or its weight has another shape.
        """

        def compute() -> Shapes:
            found: Shapes = {f"{a.module}.weight": a.shape for a in adapted}
            resized = {n: s for n, s in found.items() if self.fits_vocabulary(n, s)}
            check_shapes(adapted, {**self.base.shapes, **resized}, self.name, self.base.name)
            return found

        return self.compute_once(adapted, compute)

    def check_dense(self, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Check changes of whole parameters against the base.

        Args:
            shapes: The shape of the change of each parameter.

        Returns:
            The same shapes, and the shapes of parameters that share a changed weight.

        Raises:
            HubError: The base lacks a parameter, or it has another shape.
        """
        found = dict(shapes)
        for use, stored in self.base.tied.items():
            if stored in shapes:
                found.setdefault(use, shapes[stored])
        for name, shape in found.items():
            own = self.base.shapes.get(name)
            if own != shape and not self.fits_vocabulary(name, shape):
                raise HubError(
                    f"{self.name} changes {name} {list(shape)}, but {self.base.name} has "
                    + ("no such parameter" if own is None else f"{list(own)}"),
                    "use the base that the expert was trained on",
                )
        return found


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
