"""Publishing experts: a repository with the bytes as they are stored, and a card."""

from __future__ import annotations

from dataclasses import dataclass

from experthub.hub._files import draft_folder, hub_home, write_text
from experthub.hub.bases import Report, silent
from experthub.hub.card import model_card
from experthub.hub.describe import write_description
from experthub.hub.expert import Expert
from experthub.hub.registry import Registry, register
from experthub.hub.store import Store


@dataclass(frozen=True)
class Pushed:
    """What was published.  files: name -> bytes.  commit: None for a dry run."""

    target: str
    files: dict[str, int]
    commit: str | None


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
    """Publish an expert as one commit of a model repository.

    target: `hf:org/name[@branch]`; the repository is made if there is none.  private: a new one.
    Raises UsageError for another kind of target, AuthError without the right to write,
    ConflictError when somebody else pushed meanwhile.
    """
    from experthub.hub.remotes import hf_push

    place = hf_push.target(target)
    with draft_folder(hub_home() / "drafts" / "push") as folder:
        store.copy_out(expert.digest, folder)
        identity = store.identity(expert.digest)
        write_description(folder, expert, identity)
        write_text(folder / "README.md", model_card(expert, identity, registry, place.repository))
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        if dry_run:
            return Pushed(target, files, None)
        report(f"pushing {expert.reference} to {target}", 0, 0)
        commit = hf_push.push(
            place, folder, message or f"Add {expert.reference}", private=private, tag=tag
        )
    source = f"hf:{place.repository}@{commit}"
    if source not in expert.sources:
        register(expert.model_copy(update={"sources": [*expert.sources, source]}))
    return Pushed(target, files, commit)
