"""Models of Ollama: a manifest names the blob that holds the weights, a GGUF file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from experthub.hub.errors import IntegrityError, NotFoundError, UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.spelling import suggest_name

MODEL_LAYER = "application/vnd.ollama.image.model"
NAME_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
BLOB = re.compile(r"sha256-[0-9a-f]{64}")


def find_blob(source: str) -> Path:
    """Find the file with the weights of one of Ollama's models.

    Ollama keeps its models in `$OLLAMA_MODELS`, by default in `~/.ollama/models`.

    Args:
        source: `ollama:NAME`, `ollama:NAME:TAG` or `ollama:NAMESPACE/NAME:TAG`. The tag is `latest`
            by default.

    Returns:
        The path of the blob.

    Raises:
        UsageError: The source is malformed.
        NotFoundError: Ollama has no such model here.
        IntegrityError: The manifest is damaged, or its blob is missing.
    """
    found = re.fullmatch(
        rf"ollama:(?:({NAME_PART})/)?(?:({NAME_PART})/)?({NAME_PART})(?::({NAME_PART}))?", source
    )
    if not found:
        raise UsageError(
            f"{source[:200]!r} is not a source", "write ollama:NAME or ollama:NAME:TAG"
        )
    host, space, name, tag = found.groups()
    if host and not space:
        host, space = None, host
    root = locate_models()
    manifests = root / "manifests"
    place = host or "registry.ollama.ai", space or "library", name, tag or "latest"
    manifest = manifests.joinpath(*place)
    if not manifest.is_file():
        known = _list_models(manifests)
        hint = suggest_name(source.removeprefix("ollama:"), known, "ollama:") if known else ""
        raise NotFoundError(
            f"Ollama has no model {name}:{place[3]} in {root}",
            hint or f"run ollama pull {name}, or set OLLAMA_MODELS to the folder of its models",
        )
    layers = read_json(manifest).get("layers")
    digests = [
        str(layer.get("digest")).replace(":", "-")
        for layer in (layers if isinstance(layers, list) else [])
        if isinstance(layer, dict) and layer.get("mediaType") == MODEL_LAYER
    ]
    if len(digests) != 1 or not BLOB.fullmatch(digests[0]):
        raise IntegrityError(
            f"{manifest} does not name one file of weights", f"run ollama pull {name} again"
        )
    blob = root / "blobs" / digests[0]
    if not blob.is_file():
        raise IntegrityError(
            f"{source}: its weights, {blob}, are missing", f"run ollama pull {name} again"
        )
    return blob


def locate_models() -> Path:
    """Return the folder of Ollama's models, whether it exists or not.

    Returns:
        `OLLAMA_MODELS`, or `~/.ollama/models` if this variable is not set.
    """
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def _list_models(manifests: Path) -> list[str]:
    """List the models of Ollama's own library as `NAME:TAG`."""
    found = manifests.glob("registry.ollama.ai/library/*/*")
    return sorted(f"{path.parent.name}:{path.name}" for path in found if path.is_file())
