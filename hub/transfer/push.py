"""Pushing: publish the stored bytes of an expert where others can pull them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import UsageError
from experthub.hub.registry.entries import add_source
from experthub.hub.registry.expert import DESCRIPTION, Expert, make_source_absolute
from experthub.hub.session import Session
from experthub.hub.transfer.describe import format_description
from experthub.hub.transfer.model_card import format_model_card
from experthub.hub.transfer.oci_image import Blob, make_image, measure_blob, write_folder
from experthub.hub.transfer.remotes import hf_push


@dataclass(frozen=True)
class PushResult:
    """A published expert.

    Args:
        target: The target that the user named.
        files: The size of each published file in bytes, by name.
        commit: The commit of a repository, or the digest of the manifest in a shared folder. None
            for a dry run.
        source: The source from which the expert can be pulled now. None for a dry run.
    """

    target: str
    files: dict[str, int]
    commit: str | None = None
    source: str | None = None


def push(
    expert: Expert,
    target: str,
    session: Session,
    *,
    private: bool = False,
    message: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
) -> PushResult:
    """Publish an expert as one commit of a model repository, or in a shared folder.

    Args:
        expert: The expert, which is in the store.
        target: `hf:org/name[@branch]` or `file:DIR`. A repository or folder that does not exist is
            created.
        session: The registry, the store and the progress callback.
        private: Create the repository as private if it does not exist.
        message: The message of the commit.
        tag: A tag for the commit.
        dry_run: Only find out which files would be published.

    Returns:
        The published files, and the source from which they can be pulled.

    Raises:
        UsageError: The target has another form, or an option does not apply to it.
        AuthError: The token has no write permission.
        ConflictError: Somebody else pushed meanwhile, or the folder has other content under this
            name and version.
    """
    store = session.store
    identity = store.read_identity(expert.digest)
    session.report(f"pushing {expert.reference} to {target}", 0, 0)
    if target.startswith("file:"):
        if private or message or tag:
            raise UsageError(
                "--private, --message and --tag apply only to hf: targets", "leave them out"
            )
        place = make_source_absolute(target, Path.cwd()).removeprefix("file:")
        image = make_image(expert, store)
        files = {name: measure_blob(content) for name, content in image.files.items()}
        if dry_run:
            return PushResult(target, files)
        write_folder(image, Path(place))
        source = f"file:{place}#{expert.reference}"
        add_source(expert, source)
        session.refresh()
        return PushResult(target, files, str(image.entry["digest"]), source)

    repository = hf_push.parse_target(target)
    content: dict[str, Blob] = {n: store.verify_file(expert.digest, n) for n in identity.files}
    content[DESCRIPTION] = format_description(expert, identity).encode()
    card = format_model_card(expert, identity, session.registry, repository.repository)
    content["README.md"] = card.encode()
    files = {name: measure_blob(data) for name, data in content.items()}
    if dry_run:
        return PushResult(target, files)
    message = message or f"Add {expert.reference}"
    commit = hf_push.push(repository, content, message, private=private, tag=tag)
    source = f"hf:{repository.repository}@{commit}"
    add_source(expert, source)
    session.refresh()
    return PushResult(target, files, commit, source)
