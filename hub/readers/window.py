"""The number of tokens that a base can read at once, and the rule for longer texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import find_class, limit_size
from experthub.hub.errors import UsageError
from experthub.hub.formats.embedding_rule import read_embedding_rule
from experthub.hub.progress import Report, silent
from experthub.hub.readers.scorer import Long
from experthub.hub.transfer.remotes.no_network import forbid_network

# The names under which configurations state how many positions a model has.
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")
TABLE = "position_embeddings"


@dataclass
class Window:
    """The window of a base: how many tokens it can read at once, and what happens to more.

    Args:
        size: The largest number of tokens; None if the base has no limit.
        name: The name of the base, for messages.
        long: `cut` drops the tokens that do not fit, with one note; `refuse` raises an error.
        report: A callback for the note.
    """

    size: int | None = None
    name: str = "the base"
    long: Long = "cut"
    report: Report = silent
    _noted: bool = field(default=False, repr=False)

    @classmethod
    def of(
        cls, base: Base, long: Long = "cut", report: Report = silent, virtual_tokens: int = 0
    ) -> Window:
        """Find the window of a base.

        Args:
            base: The base.
            long: The rule for longer texts.
            report: A callback for the note.
            virtual_tokens: The number of tokens that soft prompts put before each text.

        Returns:
            The window. A sentence encoder may state a smaller one than its positions allow.
        """
        kind, config = find_class(base)
        modules: Iterable[Any] = ()
        if any(name.endswith(TABLE + ".weight") for name in base.shapes):
            with torch.device("meta"), forbid_network(), limit_size(base):
                modules = kind(config).named_modules()
        size = find_limit(config, modules)
        stated = read_embedding_rule(base.folder).tokens if base.is_encoder else None
        if stated is not None:
            size = min(stated, size or stated)
        if size is not None:
            size -= virtual_tokens
        return cls(size, base.name, long, report)

    def fits(self, tokens: int, text: str) -> bool:
        """Check whether a text fits; note or refuse it if it does not.

        Args:
            tokens: The number of tokens that are read, with those that follow the text.
            text: The text, whose beginning names it in the message.

        Returns:
            Whether the text fits. If it does not, it is to be cut.

        Raises:
            UsageError: The text does not fit, and the rule is `refuse`.
        """
        if self.size is None or tokens <= self.size:
            return True
        start = " ".join(text.split())[:40]
        found = f"{start!r}... has {tokens} tokens, and {self.name} reads at most {self.size}"
        if self.long == "refuse":
            raise UsageError(f"the text {found}", "shorten the text, or use --long cut")
        if not self._noted:
            self._noted = True
            self.report(f"note: the text {found}; it is cut, and so are other long ones", 0, 0)
        return False

    def refuse(self, what: str, hint: str) -> NoReturn:
        """Refuse what cannot be cut.

        Args:
            what: What is too long.
            hint: The next step.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{what}, and {self.name} reads at most {self.size} tokens", hint)


def find_limit(config: Any, modules: Iterable[tuple[str, Any]]) -> int | None:
    """Find how many tokens a model can read at once.

    Args:
        config: The configuration of the model.
        modules: The modules of the model by path. A table of positions with a padding index, as
            RoBERTa has one, does not use its first rows.

    Returns:
        The number of tokens; None if the model has no limit, such as T5, Mamba and others with
        relative positions.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = [getattr(text, name, None) for name in LIMITS]
    sizes = [n for n in stated if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    tables = _find_reserved_tables(modules)
    return min([*sizes, *(t.num_embeddings - t.padding_idx - 1 for t in tables)], default=None)


def has_reserved_positions(modules: Iterable[tuple[str, Any]]) -> bool:
    """Tell whether positions of a model begin after a padding index, as those of RoBERTa do.

    Args:
        modules: The modules of the model by path.

    Returns:
        Whether they do.
    """
    return any(True for _ in _find_reserved_tables(modules))


def _find_reserved_tables(modules: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    """Find the tables of positions whose first rows, up to a padding index, are not used."""
    for path, module in modules:
        if path.endswith(TABLE) and getattr(module, "padding_idx", None) is not None:
            yield module
