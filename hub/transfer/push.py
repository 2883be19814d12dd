"""Publishing experts: the bytes as they are stored, where others can pull them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import UsageError
from experthub.hub.registry.entries import add_source
from experthub.hub.registry.expert import DESCRIPTION, Expert, absolute_source
from experthub.hub.session import Session
from experthub.hub.transfer.describe import description
from experthub.hub.transfer.model_card import model_card
from experthub.hub.transfer.oci_image import Blob, image, size_of, write_folder
from experthub.hub.transfer.remotes import hf_push


@dataclass(frozen=True)
class Pushed:
    """What was published.

    files: name -> bytes.  commit: of a repository, or the digest of the manifest in a folder; None
    for a dry run.  source: where it can be pulled from now.
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
) -> Pushed:
    """Publish an expert as one commit of a model repository, or into a shared folder.

    Args:
        expert: The expert, which is in the store.
        target: `hf:org/name[@branch]` or `file:DIR`. The repository or the folder is created if it
            does not exist.
        session: The registry, the store and the progress callback.
        private: Create the repository as private if it does not exist.
        message: The message of the commit.
        tag: A tag for the commit.
        dry_run: Only find out which files would be published.

    Returns:
        The published files, and the source from which they can be pulled.

    Raises:
        UsageError: The target has another form, or an option does not suit it.
        AuthError: The token has no write permission.
        ConflictError: Somebody else pushed meanwhile, or the folder has other content under this
            name and version.
    """
    store = session.store
    identity = store.identity(expert.digest)
    session.report(f"pushing {expert.reference} to {target}", 0, 0)
    if target.startswith("file:"):
        if private or message or tag:
            raise UsageError("--private, --message and --tag are for hf:", "leave them out")
        place = absolute_source(target, Path.cwd()).removeprefix("file:")
        made = image(expert, store)
        files = {name: size_of(content) for name, content in made.files.items()}
        if dry_run:
            return Pushed(target, files)
        write_folder(made, Path(place))
        source = f"file:{place}#{expert.reference}"
        add_source(expert, source)
        return Pushed(target, files, str(made.entry["digest"]), source)

    repository = hf_push.target(target)
    content: dict[str, Blob] = {n: store.file(expert.digest, n) for n in identity.files}
    content[DESCRIPTION] = description(expert, identity).encode()
    card = model_card(expert, identity, session.registry, repository.repository)
    content["README.md"] = card.encode()
    files = {name: size_of(data) for name, data in content.items()}
    if dry_run:
        return Pushed(target, files)
    message = message or f"Add {expert.reference}"
    commit = hf_push.push(repository, content, message, private=private, tag=tag)
    source = f"hf:{repository.repository}@{commit}"
    add_source(expert, source)
    return Pushed(target, files, commit, source)
