"""Converting an adapter of any known format and type into a folder of the hub's own kinds."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find, is_available_locally
from experthub.hub.conversion.base_weights import StoredBase
from experthub.hub.conversion.changes import Changes, read_changes
from experthub.hub.conversion.drafts import write_dense, write_low_rank, write_renamed
from experthub.hub.conversion.file_formats import diffusers, gguf_lora, kohya, mlx, peft_files
from experthub.hub.conversion.file_formats.pickles import read_pickle
from experthub.hub.conversion.foreign_adapter import ForeignAdapter
from experthub.hub.conversion.found_adapter import FORMATS, FoundAdapter, find_adapter
from experthub.hub.conversion.prompts import is_prompt, write_prompt
from experthub.hub.errors import HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files.atomic import create_folder
from experthub.hub.files.digests import sha256_of
from experthub.hub.files.path_checks import check_free
from experthub.hub.finetunes.form import Form
from experthub.hub.formats.lora_config import is_plain_init
from experthub.hub.kinds import kinds
from experthub.hub.session import Session

INITIAL = "pissa_init"  # The folder in which LLaMA-Factory keeps the adapter before its training.


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        folder: The folder that was written.
        kind: The kind of expert in it.
        made_from: The record for the registry: the format and the type of the source, its sha256,
            and the error of the conversion.
        notes: Facts that the user should know.
    """

    folder: Path
    kind: str
    made_from: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    subfolder: str = "",
    adapter: str | None = None,
    initial: str | Path | None = None,
    session: Session | None = None,
) -> Conversion:
    """Convert an adapter into a new folder that the hub and peft read.

    Args:
        source: The folder or the file of the adapter.
        out: The folder to write, which must not exist.
        base: The base, for changes that depend on its weights. The default is the one that the
            adapter names.
        rank: Store a LoRA of this rank, by SVD. By default the change is stored exactly.
        dtype: The dtype of computed tensors: `float32`, `bfloat16` or `float16`.
        subfolder: The sub-folder that holds the adapter, if there are several.
        adapter: The adapter to choose, if one file holds several.
        initial: The folder of the adapter before its training, for PiSSA and similar.
        session: The registry and the progress callback. The default is `Session()`.

    Returns:
        What was written.

    Raises:
        UsageError: The folder holds an expert of the hub already.
        ConflictError: The new folder is in use.
        HubError: The adapter cannot be converted; the message gives the reason.

    Example:
        >>> from experthub import hub
        >>> hub.convert("./my-dora", "./mine", base="smollm2-135m-instruct").kind  # doctest: +SKIP
        'task_vector'
    """
    session = session or Session()
    found = find_adapter(Path(source), subfolder)
    if found.format == "hub":
        raise UsageError(
            f"{found.folder} is an expert already", f"run hub add {found.folder} --name NAME"
        )
    check_free(Path(out))
    with create_folder(Path(out)) as draft:
        kind, made_from, notes = convert_into(
            found,
            draft,
            session,
            base=base,
            form=Form(rank, dtype=dtype or "float32"),
            adapter=adapter,
            initial=Path(initial) if initial else None,
            pickles=True,
        )
    return Conversion(Path(out), kind, made_from, notes)


def convert_into(
    found: FoundAdapter,
    folder: Path,
    session: Session,
    *,
    base: str | None = None,
    form: Form | None = None,
    adapter: str | None = None,
    initial: Path | None = None,
    pickles: bool = False,
) -> tuple[str, dict[str, Any], list[str]]:
    """Convert an adapter into an existing, empty folder.

    Args:
        found: The adapter.
        folder: The folder.
        session: The registry and the progress callback.
        base: The base; the default is the one that the adapter names.
        form: The rank and the dtype.
        adapter: The adapter to choose, if one file holds several.
        initial: The folder of the adapter before its training.
        pickles: Whether a pickle may be read, in a process of its own.

    Returns:
        The kind of expert that was written, the record for the registry, and notes.

    Raises:
        IntegrityError: The file was changed while it was read.
        HubError: The adapter cannot be converted.
    """
    form = form or Form()
    before = sha256_of(found.weights)
    with ExitStack() as opened:
        named = base or str(
            found.config.get("base_model_name_or_path") or found.config.get("model") or ""
        )
        stored = StoredBase(lambda: _find_base(named, found, session), str(found.folder))
        foreign = _read(found, adapter, opened, pickles, stored)
        if is_prompt(foreign.config):
            type_name = str(foreign.config["peft_type"]).upper()
            figures = write_prompt(foreign, folder, form)
        else:
            start = _find_initial(found, initial)
            changes = read_changes(
                foreign, stored, _read(start, None, opened, False) if start else None
            )
            type_name = _name_type(changes)
            figures = _write(changes, stored, folder, form, session)
    if sha256_of(found.weights) != before:
        raise IntegrityError(
            f"{found.weights} was changed while it was read", "try again when nothing writes to it"
        )
    kind = kinds.recognise(folder)
    try:
        kind.check(folder)
    except HubError as error:
        error.message = error.message.replace(str(folder), str(found.folder))
        raise
    made_from = {
        "format": FORMATS[found.format],
        "type": type_name,
        "sha256": before,
        **figures,
    }
    made_from |= {"base": named} if named else {}
    return kind.name, made_from, foreign.notes


def _read(
    found: FoundAdapter,
    adapter: str | None,
    opened: ExitStack,
    pickles: bool,
    base: StoredBase | None = None,
) -> ForeignAdapter:
    """Read an adapter in its format."""
    if found.format == "pickle":
        if not pickles:
            raise IntegrityError(
                f"{found.folder} holds {found.weights.name}, a pickle, and no safetensors: "
                "reading a pickle can run code",
                f"run hub convert {found.place} OUT, which reads it in a process without network "
                "and files, then hub add OUT",
            )
        return read_pickle(found, adapter, opened)
    if found.format == "mlx":
        return mlx.read(found)
    if found.format == "kohya":
        return kohya.read(found, base)
    if found.format == "diffusers":
        return diffusers.read(found)
    if found.format == "gguf":
        return gguf_lora.read(found, base)
    return peft_files.read(found, adapter)


def _find_base(name: str, found: FoundAdapter, session: Session) -> Base:
    """Find the base that a change depends on; refuse one that would have to be fetched."""
    way = f"run hub convert {found.place} OUT --base BASE with the base it was trained on"
    if not name:
        raise HubError(
            f"{found.place} names no base, and the conversion needs the base's weights", way
        )
    known = session.registry.has_base(name)
    remote = ("hf:", "file:", "ollama:", "pypi:")
    if not known and not Path(name).exists() and not name.startswith(remote):
        raise NotFoundError(
            f"{found.place} names the base {name[:200]!r}, which no registry knows, "
            "and the conversion needs the base's weights",
            way,
        )
    if known and not is_available_locally(session.registry.find_base(name)[0], session.registry):
        session.report(f"fetching the base {name}", 0, 0)
    local = not known and not name.startswith(remote)
    reference = str(Path(name).resolve()) if local else name
    return find(reference, session)


def _find_initial(found: FoundAdapter, initial: Path | None) -> FoundAdapter | None:
    """Find the adapter before its training: the given one, or the one that lies beside it."""
    place = initial or found.folder / INITIAL
    return find_adapter(place) if initial or place.is_dir() else None


def _write(
    changes: Changes, base: StoredBase, folder: Path, form: Form, session: Session
) -> dict[str, Any]:
    """Write the changes in the form that holds them."""
    config = changes.adapter.config
    if not changes.kind.low_rank:
        return write_dense(changes, base, folder, form, session.report)
    plain = changes.kind.name == "LORA" and _is_plain(changes)
    if config.get("bias", "none") != "none" and changes.dense:
        return write_dense(changes, base, folder, form, session.report)
    if plain and form.rank is None and form.dtype == "float32":
        return write_renamed(changes, folder)
    return write_low_rank(changes, base, folder, form.rank, form.dtype)


def _is_plain(changes: Changes) -> bool:
    """Tell whether a LoRA leaves the base's weights as they are."""
    return is_plain_init(changes.adapter.config.get("init_lora_weights"))


def _name_type(changes: Changes) -> str:
    """Return the type of an adapter, as its authors call it."""
    config = changes.adapter.config
    if config.get("use_dora"):
        return "DoRA"
    start = config.get("init_lora_weights")
    return str(start) if isinstance(start, str) and not _is_plain(changes) else changes.kind.name
