"""Writing of models that were made from a base, with everything else that the base's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.building import explain_loading_errors, list_loading_errors
from experthub.hub.bases.loading import check_unchanged
from experthub.hub.files.atomic import open_atomically
from experthub.hub.files.digests import CHUNK
from experthub.hub.formats.model_files import list_companions


def write_model(base: Base, model: Any, folder: Path) -> None:
    """Write a model that was made from a base: its configurations, its weights, its companions.

    Args:
        base: The base.
        model: The model.
        folder: The folder.

    Raises:
        HubError: Transformers cannot save the model.
        IntegrityError: A file of the base was changed since it was found.
    """
    with explain_loading_errors(base, list_loading_errors(), "save"):
        model.save_pretrained(folder)
    copy_companions(base, folder)


def copy_companions(base: Base, folder: Path) -> None:
    """Copy the files of a base that are neither its weights nor its configuration.

    They are the files of the tokenizer and of processors, the licence, and the parts of a sentence
    encoder, see `list_companions`. A file that the folder has already is kept.

    Args:
        base: The base.
        folder: The folder.

    Raises:
        HubError: A part of a sentence encoder has weights that are not safetensors.
        IntegrityError: A file of the base was changed since it was found.
    """
    for name in list_companions(base.folder):
        if not (folder / name).exists():
            with (base.folder / name).open("rb") as source, open_atomically(folder / name) as file:
                while chunk := source.read(CHUNK):
                    file.write(chunk)
    check_unchanged(base)
