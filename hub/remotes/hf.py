"""Model folders from the Hugging Face Hub, by its own client."""

from __future__ import annotations

import os
import re
from pathlib import Path

from experthub.hub.errors import AuthError, HubError, NotFoundError, UsageError
from experthub.hub.remotes._http import check_online, is_offline

MODEL_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]


def fetch(source: str, folder: Path) -> Path:
    """A snapshot of `hf:org/name[@revision]` in the client's cache: safetensors and JSON only."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+|[\w.-]+)(?:@([\w./-]+))?", source)
    if not found:
        raise UsageError(f"{source!r} is no source", "write hf:org/name or hf:org/name@revision")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                found.group(1),
                revision=found.group(2),
                allow_patterns=MODEL_FILES,
                local_files_only=is_offline(),
                cache_dir=folder,
            )
        )
    except GatedRepoError as error:
        raise AuthError(f"{source} is gated", "ask for access and set HF_TOKEN") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFoundError(
            f"{source} does not exist", "check the name, or set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{source!r} is no source: {error}", "write hf:org/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        check_online(source)
        answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if answer is not None and answer.status_code in (401, 403):
            raise AuthError(f"{source} answered {answer.status_code}", "set HF_TOKEN") from error
        raise HubError(
            f"cannot fetch {source}: {' '.join(str(error).split())[:200]}",
            "check the network and HF_ENDPOINT",
        ) from error
