"""Tokenizers of bases, whose errors become one sentence when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import EMBEDDINGS
from experthub.hub.errors import HubError
from experthub.hub.formats.added_tokens import NewToken
from torch import Tensor

# Not only those that a causal model ties to its outputs.
TOKEN_EMBEDDINGS = (*EMBEDDINGS, "token_embedding.weight", "shared.weight")
MAX_IDS = 1 << 22  # The largest vocabularies have about a million tokens.


class CheckedTokenizer:
    """A tokenizer of transformers whose files may be damaged.

    A damaged vocabulary, setting or chat template often shows only when a text is read or written.
    The package tokenizers raises Exception itself, so that no narrower class can be named. An error
    that says already what is wrong, a HubError, is not changed.

    Args:
        tokenizer: The tokenizer.
        name: The name of its base, for errors.
        folder: The folder of its files, for errors.
        shapes: The shape of each parameter of the base.
        added: The number of embeddings, if experts add some.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        added: int | None = None,
    ) -> None:
        rows = [s[0] for n, s in shapes.items() if n.endswith(TOKEN_EMBEDDINGS) and len(s) == 2]
        rows = rows if added is None else [added]
        own = {"tokenizer": tokenizer, "name": name, "folder": folder}
        vars(self).update(own, n_ids=max(rows, default=None))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the tokenizer."""
        setattr(self.tokenizer, name, value)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tokenizer. A method raises HubError for every error."""
        # A copy or an unpickled object is asked for names before it has its attributes.
        if name.startswith("__") or "tokenizer" not in vars(self):
            raise AttributeError(name)
        found = getattr(self.tokenizer, name)
        return self._explain_call(found, name) if callable(found) else found

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""
        return len(self.tokenizer)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Tokenise texts, and check that the base has an embedding of every token."""
        found = self._explain_call(self.tokenizer, "read a text")(*texts, **options)
        with self._explain("read a text"):
            largest = _find_largest(found["input_ids"])
        if largest < 0 and any(text.strip() for text in _flatten(texts[0])):
            raise HubError(
                f"base {self.name}: its tokenizer makes no tokens of a text",
                f"check the vocabulary of the tokenizer in {self.folder}, or get it again",
            )
        if self.n_ids is not None and largest >= self.n_ids:
            raise HubError(
                f"base {self.name}: its tokenizer makes the token {largest}, "
                f"and the model has {self.n_ids} embeddings",
                f"get the tokenizer of this model again, into {self.folder}",
            )
        return found

    def save_pretrained(self, folder: Path) -> None:
        """Write the files of the tokenizer.

        Args:
            folder: The folder.

        Raises:
            HubError: An id is so large that writing would take minutes, or a file cannot be written.
        """
        largest = max(self.get_vocab().values(), default=0)
        if largest >= MAX_IDS:
            raise HubError(
                f"base {self.name}: its tokenizer has the id {largest}, at most {MAX_IDS - 1} is read",
                f"get the tokenizer of this model again, into {self.folder}",
            )
        self._explain_call(self.tokenizer.save_pretrained, "be saved")(folder)

    def _explain_call(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        """Wrap a function of the tokenizer, so that it raises HubError."""

        def explained(*args: Any, **options: Any) -> Any:
            with self._explain(what):
                return call(*args, **options)

        return explained

    @contextmanager
    def _explain(self, what: str) -> Iterator[None]:
        """Turn errors of the tokenizer into a HubError."""
        try:
            yield
        except HubError:
            raise
        except BaseException as error:
            # A panic in the Rust code of tokenizers is a BaseException without a public name.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise HubError(
                f"base {self.name}: its tokenizer cannot {what.replace('_', ' ')}: {reason}",
                f"check the files of the tokenizer in {self.folder}, or get them again",
            ) from None


def add_tokens(tokenizer: Any, tokens: Iterable[NewToken]) -> None:
    """Add tokens to a tokenizer, unless it has them.

    Args:
        tokenizer: A tokenizer of transformers, which is changed in place.
        tokens: The tokens; they get the next free ids in this order.
    """
    from tokenizers import AddedToken

    for token in tokens:
        added = AddedToken(token.content, special=token.special, normalized=False)
        tokenizer.add_tokens([added], special_tokens=token.special)


def _flatten(texts: Any) -> list[str]:
    """Return one text or several as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def _find_largest(ids: Any) -> int:
    """Find the largest id in the ids of one text or of several; -1 if there are none."""
    if isinstance(ids, Tensor):
        return int(ids.max()) if ids.numel() else -1
    rows = [ids] if not ids or isinstance(ids[0], int) else ids
    return max((max(row) for row in rows if len(row)), default=-1)
