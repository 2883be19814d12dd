"""The content of an expert: its digest, and the sources to fetch it from."""

from __future__ import annotations

from dataclasses import dataclass

from experthub.hub.registry.expert import Expert


@dataclass(frozen=True)
class Content:
    """A stored or fetchable expert, identified by its digest.

    Args:
        reference: The name in messages and locks: `name@version`, or the source of an expert that
            no registry has.
        digest: The digest of the content.
        sources: The sources, in the order in which they are tried.
        task: The task that the expert was trained on, or None if it is unknown.
    """

    reference: str
    digest: str
    sources: tuple[str, ...]
    task: str | None

    @classmethod
    def from_expert(cls, expert: Expert) -> Content:
        """Return the content of a registry entry.

        Args:
            expert: The entry.

        Returns:
            The content, with the sources and the task of the entry.
        """
        return cls(expert.reference, expert.digest, tuple(expert.sources), expert.task)
