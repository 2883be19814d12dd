"""Adding a folder or a file of somebody else to the store, converted if it is of another format."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experthub.hub.conversion.opening import open_native
from experthub.hub.files.atomic import hub_home, open_atomically, open_draft_folder
from experthub.hub.files.json_files import read_json
from experthub.hub.files.plain_files import open_plain
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.formats.prompt import PROMPT_EMBEDDINGS
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.proofs.local_base import (
    CannotProveError,
    check_base_is_local,
    name_peft,
    report_missing,
)
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert, make_source_relative
from experthub.hub.registry.proof_record import Proof
from experthub.hub.session import Session
from experthub.hub.transfer.describe import add_folder
from experthub.hub.transfer.sources import OpenedSource


def add_expert(
    place: Path,
    name: str,
    session: Session,
    *,
    version: int | None = None,
    base: str | None = None,
    task: str | None = None,
    description: str | None = None,
    subfolder: str = "",
    proof: bool | None = False,
    file: Path | None = None,
    **more: Any,
) -> Expert:
    """Copy an expert into the store, and register it under a name.

    Args:
        place: The folder, or the file of an adapter of another program.
        name: The name in the registry.
        session: The registry, the store and the progress callback, which also gets notes.
        version: The version. The default is the next one of the name.
        base: The name of the base that the expert was trained on.
        task: The task that the expert was trained on.
        description: One line about the expert.
        subfolder: The sub-folder that holds the adapter, if there are several.
        proof: Whether an adapter in PEFT's format is compared with peft. None means if its base is
            on this machine and not large.
        file: The registry file to write to. The default is the user's own registry.
        **more: Further arguments of `add_folder`.

    Returns:
        The expert as it is registered.

    Raises:
        HubError: The place holds no expert, or one that cannot be used.
        IntegrityError: The expert differs from what peft computes.
    """
    check_name(name)
    opened = OpenedSource(place, MappingProxyType({}))
    with open_native(opened, session, base, subfolder) as native:
        # A converted adapter is compared with its source, if peft can load that.
        source = place / subfolder if native.made_from else native.opened.folder
        whole = f"file:{(place / subfolder if subfolder else place).resolve()}"
        if not native.made_from:
            whole = f"file:{native.opened.folder.resolve()}"
        return add_folder(
            native.opened.folder,
            name,
            session,
            version=version,
            base=base or native.base,
            task=task,
            description=description,
            source=make_source_relative(whole, file.resolve().parent) if file else whole,
            file=file,
            made_from=native.made_from,
            prove=partial(_prove, source, session, proof),
            **more,
        )


def _prove(folder: Path, session: Session, proof: bool | None, expert: Expert) -> Proof | None:
    """Compare an expert with peft, unless no proof is wanted or peft could not load its source.

    peft gets a copy that nobody else can change: the stored files, or those that were converted.
    """
    if proof is False or not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER)):
        return None
    with open_draft_folder(hub_home() / "drafts" / "compared") as draft:
        if not expert.made_from:
            session.store.copy_out(expert.digest, draft)
        for name in (ADAPTER_CONFIG, ADAPTER) if expert.made_from else ():
            with (
                open_plain(folder / name, follow=True) as file,
                open_atomically(draft / name) as to,
            ):
                shutil.copyfileobj(file, to)
        return _compare(draft, session, proof is True, expert)


def _compare(folder: Path, session: Session, requested: bool, expert: Expert) -> Proof | None:
    """Compare an expert with what peft computes with a folder, if peft can load the folder."""
    if not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER)):
        return None
    names, config = read_header(folder / ADAPTER), read_json(folder / ADAPTER_CONFIG)
    if "peft_type" not in config or not all(
        n.startswith(PREFIX) or n == PROMPT_EMBEDDINGS for n in names
    ):
        return None
    if any(".default." in name for name in names) or config.get("megatron_config"):
        return None
    try:
        check_base_is_local(expert.base, session.registry)
    except CannotProveError as error:
        if requested:
            raise
        report_missing(name_peft(), error, session)
        return None
    from experthub.hub.proofs.proof import load_with_peft, prove

    return prove(expert, load_with_peft(folder), session, requested=requested)
