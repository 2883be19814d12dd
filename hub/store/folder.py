"""The identity of an expert's folder, with every check of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.atomic import sha256_of
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.adapter import check_gates, kind_of, read_adapter, read_gates
from experthub.hub.formats.coefficients import read_coefficients
from experthub.hub.formats.router import read_router
from experthub.hub.formats.safetensors_header import check_finite, read_header
from experthub.hub.formats.skills import read_skills
from experthub.hub.formats.task_vector import check_masks, files_in, read_task_vector
from experthub.hub.registry.expert import (
    ADAPTER,
    ADAPTER_CONFIG,
    COEFFICIENTS,
    COEFFICIENTS_JSON,
    GATES,
    ROUTER,
    ROUTER_JSON,
    SHARD_INDEX,
    SKILLS,
    SKILLS_JSON,
    TASK_VECTOR,
    FileInfo,
    Identity,
)
from pydantic import ValidationError


def read_folder(folder: Path, hashed: Mapping[str, str] = MappingProxyType({})) -> Identity:
    """The identity of an expert's folder, every file of it checked.

    hashed: what is known already of the files' sha256.
    Raises NotFoundError for no folder, IntegrityError for anything but a plain, finite adapter or
    task vector.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no folder {folder}", "name the folder that holds the adapter"
        )
    declared = _declared(folder)
    kind = kind_of(folder)
    if kind == "lora":
        weights = {ADAPTER: folder / ADAPTER}
        names = [ADAPTER]
        if not (folder / ADAPTER_CONFIG).is_file():
            raise IntegrityError(
                f"{folder} has no {ADAPTER_CONFIG}", "peft writes it beside the weights"
            )
        adapted = read_adapter(folder / ADAPTER_CONFIG, folder / ADAPTER, str(folder))
        names.append(ADAPTER_CONFIG)
        if (folder / GATES).is_file():
            names.append(GATES)
            check_gates(read_gates(folder / GATES), adapted, str(folder))
            check_finite(folder / GATES, read_header(folder / GATES))
    elif kind == "coefficients":
        weights = {COEFFICIENTS: folder / COEFFICIENTS}
        names = [COEFFICIENTS, COEFFICIENTS_JSON]
        read_coefficients(folder / COEFFICIENTS_JSON, folder / COEFFICIENTS)
    elif kind == "skills":
        weights = {SKILLS: folder / SKILLS}
        names = [SKILLS, SKILLS_JSON]
        read_skills(folder / SKILLS_JSON, folder / SKILLS)
    elif kind == "router":
        weights = {ROUTER: folder / ROUTER}
        names = [ROUTER, ROUTER_JSON]
        read_router(folder / ROUTER_JSON, folder / ROUTER)
    else:
        weights = files_in(folder)
        names = [*weights, *([SHARD_INDEX] if TASK_VECTOR not in weights else [])]
        read_task_vector(weights)
        for path in weights.values():
            check_masks(path)
    for path in weights.values():
        check_finite(path, read_header(path))
    files = {
        name: FileInfo(
            sha256=hashed.get(name) or sha256_of(folder / name),
            size=(folder / name).stat().st_size,
        )
        for name in sorted(names)
    }
    identity = Identity(kind=kind, base_fingerprint=None, files=files)
    if declared is None:
        return identity
    if declared.files != files or declared.kind != kind:
        raise IntegrityError(
            f"{folder}: its files are not those of its expert.json",
            "a file was changed, damaged or lost; get the folder again, or remove expert.json",
        )
    return declared


def _declared(folder: Path) -> Identity | None:
    """The identity that a folder's expert.json states, if it has one."""
    path = folder / "expert.json"
    if not path.is_file():
        return None
    try:
        return Identity.model_validate(read_json(path).get("identity"))
    except ValidationError as error:
        raise IntegrityError(
            f"{path}: no valid identity: {error.errors()[0]['msg']}",
            "remove expert.json to read the adapter",
        ) from None
