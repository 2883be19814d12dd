"""What a router sees that decides once for the whole model, and what it prepares its state from.

Shapes: B rows of S tokens, H hidden features, D features of an embedding, T tokens, I inputs of a
module, N inputs of a task, C choices, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from experthub.merge import Data
from experthub.routing._router import Weights
from torch import Tensor


@dataclass(frozen=True, eq=False)
class State:
    """What a router was prepared into; it is stored, and pinned in lock files.

    Args:
        tensors: Tensors by name, float32 or int64.
        embedder: The fingerprint of the sentence encoder that made an index, if one did.
        history: The loss of every training step, if the router was trained.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    embedder: str | None = None
    history: Sequence[float] = ()


class Embedder(Protocol):
    """A sentence encoder."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder's weights."""
        ...

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings `[len(texts), D]`."""
        ...


class RouterMaterials(Protocol):
    """What a router may ask for when it prepares its state."""

    @property
    def labels(self) -> Sequence[str]:
        """The experts' names in the recipe, in its order."""
        ...

    @property
    def n_layers(self) -> int:
        """The number of layers of the model that have something to route."""
        ...

    @property
    def n_features(self) -> int:
        """The width H of the base's hidden states."""
        ...

    def report(self, what: str, done: int, size: int) -> None:
        """Report progress: a description, the amount done, the total amount."""
        ...

    def load_embedder(self, name: str) -> Embedder:
        """Load the sentence encoder of a name."""
        ...

    def read_texts(self, expert: int) -> list[str]:
        """Return the texts of examples of the tasks that an expert was trained on."""
        ...

    def read_activations(self, expert: int, see: Callable[[str, Tensor], None]) -> None:
        """Let one expert alone read examples of its own tasks.

        Args:
            expert: The position of the expert in the recipe.
            see: Called with the path of a routed module and its inputs `[T, I]`, without padding,
                for every batch.
        """
        ...

    def read_logits(self, expert: int) -> list[Tensor]:
        """Let one expert alone read the recipe's data; returns logits `[N, C]` for each task."""
        ...

    def read_answers(self) -> list[Tensor]:
        """Return the right choices `[N]` of the recipe's data, for each task."""
        ...

    def compose(self, state: Mapping[str, Tensor]) -> Data:
        """Compose the recipe with a state in the place of a prepared one.

        Args:
            state: Tensors by name; they are put on the model's device by the caller's `place`, and
                gradients flow to them.

        Returns:
            The recipe's labelled data, read by the composed model.
        """
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """Put a tensor on the device of the model."""
        ...


class Batch(Protocol):
    """Rows that the composed model is about to read."""

    @property
    def texts(self) -> list[str]:
        """The text of each row."""
        ...

    @property
    def tasks(self) -> list[str]:
        """The task of each row, as the caller named it; empty texts if nobody did."""
        ...

    @property
    def hidden(self) -> Tensor:
        """The last hidden states `[B, S, H]` that the base alone has of these tokens."""
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """Put a tensor on the device of the rows."""
        ...


# Weights `[B, E]` or `[B, k]` of the rows over the recipe's experts, or `[E]` for every row alike;
# of a router by token, `[B, S, L, E]` for L layers, or for all layers alike if L is 1.
Select = Callable[[Batch], Weights]


def _load_no_embedder(name: str) -> Embedder:
    """Refuse to load an encoder where there is none."""
    raise ValueError(f"expected an embedder {name!r}, found none here")


@dataclass(frozen=True, eq=False)
class Pool:
    """All experts of a recipe.

    Args:
        labels: The experts' names in the recipe.
        tasks: The tasks that each was trained on; none if the expert does not say.
        state: The tensors that the router prepared.
        load_embedder: Loads a sentence encoder by name; it refuses one that did not make the index.
    """

    labels: tuple[str, ...] = ()
    tasks: tuple[tuple[str, ...], ...] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)
    load_embedder: Callable[[str], Embedder] = _load_no_embedder

    @property
    def n_experts(self) -> int:
        """The number of experts E."""
        return len(self.labels)


def one_hot(expert: int, n_experts: int) -> Tensor:
    """Return `[E]` with 1 for one expert and 0 elsewhere.

    Args:
        expert: The position of the expert.
        n_experts: The number of experts E.

    Returns:
        A float32 tensor.
    """
    return torch.nn.functional.one_hot(torch.tensor(expert), n_experts).float()
