"""The content of an expert: its digest, and where it can be fetched from."""

from __future__ import annotations

from dataclasses import dataclass

from experthub.hub.registry.expert import Expert


@dataclass(frozen=True)
class Content:
    """The content of an expert, and where to get it.

    Args:
        reference: What messages and locks call the expert: `name@version`, or its source.
        digest: The digest of the content.
        sources: Where it can be fetched from, in the order in which they are tried.
        task: The task that the expert was trained on.
    """

    reference: str
    digest: str
    sources: tuple[str, ...]
    task: str | None

    @classmethod
    def of(cls, expert: Expert) -> Content:
        """Return the content of a registry's entry.

        Args:
            expert: The entry.

        Returns:
            The content.
        """
        return cls(expert.reference, expert.digest, tuple(expert.sources), expert.task)
