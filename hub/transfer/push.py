"""Publishing experts: the bytes as they are stored, where others can pull them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experthub.hub.errors import UsageError
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import DESCRIPTION, Expert, absolute_source
from experthub.hub.registry.registry import Registry, with_source
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import description
from experthub.hub.transfer.model_card import model_card
from experthub.hub.transfer.oci_image import Content, image, size_of, write_folder


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
    registry: Registry,
    store: Store,
    *,
    private: bool = False,
    message: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    report: Report = silent,
) -> Pushed:
    """Publish an expert as one commit of a model repository, or into a shared folder.

    target: `hf:org/name[@branch]`; the repository is made if there is none; or `file:DIR`.  private:
    a new repository; message, tag: of the commit.  Raises UsageError for another kind of target,
    AuthError without the right to write, ConflictError when somebody else pushed meanwhile, or when
    the folder has other content under this name and version.
    """
    identity = store.identity(expert.digest)
    report(f"pushing {expert.reference} to {target}", 0, 0)
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
        with_source(expert, source)
        return Pushed(target, files, str(made.entry["digest"]), source)
    from experthub.hub.transfer.remotes import hf_push

    repository = hf_push.target(target)
    content: dict[str, Content] = {n: store.file(expert.digest, n) for n in identity.files}
    content[DESCRIPTION] = description(expert, identity).encode()
    content["README.md"] = model_card(expert, identity, registry, repository.repository).encode()
    files = {name: size_of(data) for name, data in content.items()}
    if dry_run:
        return Pushed(target, files)
    message = message or f"Add {expert.reference}"
    commit = hf_push.push(repository, content, message, private=private, tag=tag)
    source = f"hf:{repository.repository}@{commit}"
    with_source(expert, source)
    return Pushed(target, files, commit, source)
