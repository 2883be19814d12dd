"""Experts as OCI images, by the ModelPack specification of the CNCF, in a folder or an archive.

An expert with one description always gives the same manifest digest: nothing in it depends on the
time or the place. https://github.com/modelpack/model-spec (v0.0.7)
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from experthub.hub.errors import ConflictError
from experthub.hub.files.atomic import DRAFT, list_folder, open_atomically
from experthub.hub.files.digests import CHUNK, canonical_json
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.formats.oci_layout import (
    EXPERT_DIGEST,
    FILE_NAME,
    INDEX,
    MARK,
    REFERENCE,
    OciLayout,
)
from experthub.hub.registry.expert import DESCRIPTION, Expert
from experthub.hub.store.objects import parse_sha256
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import format_description

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MODEL_TYPE = "application/vnd.cncf.model"

Blob = Path | bytes  # The path of an object, or bytes.


@dataclass(frozen=True)
class Image:
    """An expert in the form in which it is shared.

    Args:
        expert: The expert.
        files: The expert's own files by name.
        entry: The line for the index of a layout.
        blobs: The files, the config and the manifest by sha256.
    """

    expert: Expert
    files: dict[str, Blob]
    entry: dict[str, Any]
    blobs: dict[str, Blob]


def make_image(expert: Expert, store: Store) -> Image:
    """Package a stored expert.

    Args:
        expert: The expert.
        store: The store.

    Returns:
        The image. The bytes of the files were verified.

    Raises:
        NotFoundError: The expert is not in the store.
        IntegrityError: A file is damaged.
    """
    blobs: dict[str, Blob] = {}
    identity = store.read_identity(expert.digest)
    files: dict[str, Blob] = {n: store.verify_file(expert.digest, n) for n in identity.files}
    files[DESCRIPTION] = format_description(expert, identity).encode()
    layers = []
    for name, content in files.items():
        kind = "weight" if name.endswith(".safetensors") else "weight.config"
        named = {FILE_NAME: name, "org.opencontainers.image.title": name}
        layer = _add_blob(f"{MODEL_TYPE}.{kind}.v1.raw", content, blobs)
        layers.append(layer | {"annotations": named})
    config = {
        "descriptor": {"name": expert.name, "version": str(expert.version)}
        | ({"description": expert.description} if expert.description else {})
        | ({"licenses": [expert.license]} if expert.license else {}),
        "config": {"format": "safetensors"},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
    stated = {
        EXPERT_DIGEST: expert.digest,
        "dev.experthub.expert.kind": expert.kind,
        "dev.experthub.expert.base": expert.base,
        "dev.experthub.expert.base.fingerprint": identity.base_fingerprint,
        "dev.experthub.expert.format": "1",
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": f"{MODEL_TYPE}.manifest.v1+json",
        "config": _add_blob(f"{MODEL_TYPE}.config.v1+json", canonical_json(config), blobs),
        "layers": layers,
        "annotations": {key: value for key, value in stated.items() if value},
    }
    entry = _add_blob(MANIFEST_TYPE, canonical_json(manifest), blobs)
    marks = {REFERENCE: expert.reference, EXPERT_DIGEST: expert.digest}
    return Image(expert, files, entry | {"annotations": marks}, blobs)


def _add_blob(kind: str, content: Blob, blobs: dict[str, Blob]) -> dict[str, Any]:
    """Add a blob to the blobs of an image, and return its OCI descriptor."""
    if isinstance(content, Path):
        sha256, size = parse_sha256(content), content.stat().st_size
    else:
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    blobs[sha256] = content
    return {"mediaType": kind, "digest": f"sha256:{sha256}", "size": size}


def write_folder(image: Image, folder: Path) -> None:
    """Add an image to a shared folder.

    The blobs are written first and the index last, so that readers see the old or the new content.

    Args:
        image: The image.
        folder: A shared folder, an empty folder, or a path that does not exist.

    Raises:
        ConflictError: The folder is not a shared folder, or has other content under the name and
            version.
    """
    own = {".lock", "blobs", MARK, INDEX}
    # Another push may be writing a draft, or a killed one may have left it.
    names = {path.name for path in list_folder(folder) if not DRAFT.fullmatch(path.name)}
    if names - own:
        raise ConflictError(
            f"{folder} holds other files, and is not a shared folder", "name a new folder"
        )
    with hold_lock(folder / ".lock"):
        present = OciLayout.read(folder).entries if (folder / INDEX).is_file() else []
        entries = [image.entry]
        for entry in present:
            if entry.annotations.get(REFERENCE) != image.expert.reference:
                entries.append(entry.model_dump(mode="json", exclude_unset=True))
            elif entry.annotations.get(EXPERT_DIGEST) != image.expert.digest:
                raise ConflictError(
                    f"{folder} already has {image.expert.reference} with other content",
                    "register yours as a new version, or push to another folder",
                )
        for name, content in _list_files([image], entries).items():
            path = folder / name
            if name == INDEX or not path.is_file() or path.stat().st_size != measure_blob(content):
                with open_atomically(path) as file, _open_blob(content) as data:
                    shutil.copyfileobj(data, file, CHUNK)


def write_archive(images: Sequence[Image], path: Path) -> None:
    """Write images to a new tar archive. The same experts always give the same bytes.

    Args:
        images: The images.
        path: The path of the archive.

    Raises:
        ConflictError: The path exists.
    """
    if path.exists():
        raise ConflictError(f"{path} exists already", "name a new file, or remove this one")
    with (
        open_atomically(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name, content in _list_files(images, [image.entry for image in images]).items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = measure_blob(content), 0o644
            with _open_blob(content) as data:
                archive.addfile(member, data)


def _list_files(images: Sequence[Image], entries: list[dict[str, Any]]) -> dict[str, Blob]:
    """List the files of a layout by name, in the order in which they must be written."""
    blobs = {f"blobs/sha256/{k}": v for image in images for k, v in image.blobs.items()}
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": sorted(entries, key=canonical_json),
    }
    mark = canonical_json({"imageLayoutVersion": "1.0.0"})
    return {**dict(sorted(blobs.items())), MARK: mark, INDEX: canonical_json(index)}


def measure_blob(content: Blob) -> int:
    """Return the size of a blob.

    Args:
        content: The blob.

    Returns:
        The size in bytes.
    """
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _open_blob(content: Blob) -> IO[bytes]:
    """Open a blob for reading."""
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
