"""The inputs of routers that decide once for the whole model, and the materials of their states.

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
    """The prepared state of a router, which is stored and pinned in lock files.

    Args:
        tensors: Tensors by name, float32 or int64.
        embedder: The fingerprint of the sentence encoder that made the index, if there is one.
        history: The loss of every training step, if the router was trained.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    embedder: str | None = None
    history: Sequence[float] = ()


class Embedder(Protocol):
    """A sentence encoder."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder: of everything that changes its embeddings."""
        ...

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings `[len(texts), D]`."""
        ...


class RouterMaterials(Protocol):
    """The materials that a router can use when it prepares its state."""

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
        """Report progress.

        Args:
            what: A description of the operation.
            done: The amount done.
            size: The total amount; 0 if it is unknown.
        """
        ...

    def load_embedder(self, name: str) -> Embedder:
        """Load a sentence encoder by the name of its base."""
        ...

    def read_texts(self, expert: int) -> list[str]:
        """Return the texts of examples of the tasks that an expert was trained on."""
        ...

    def read_activations(self, expert: int, see: Callable[[str, Tensor], None]) -> None:
        """Run one expert alone on examples of its own tasks, and pass on its modules' inputs.

        Args:
            expert: The position of the expert in the recipe.
            see: A function that is called with the path of a routed module and its inputs `[T, I]`,
                without padding, for every batch.
        """
        ...

    def read_logits(self, expert: int) -> list[Tensor]:
        """Return the logits `[N, C]` of one expert alone for each task of the recipe's data."""
        ...

    def read_answers(self) -> list[Tensor]:
        """Return the right choices `[N]` for each task of the recipe's data."""
        ...

    def compose(self, state: Mapping[str, Tensor]) -> Data:
        """Compose the recipe with the given tensors as the router's state.

        Args:
            state: Tensors by name, on the device of the model (see `place`). Gradients flow to them.

        Returns:
            The recipe's data, read by the composed model. It has labels if the router is registered
            as one that needs them.
        """
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of the model."""
        ...


class Batch(Protocol):
    """Rows that the composed model is about to read."""

    @property
    def texts(self) -> list[str]:
        """The text of each row."""
        ...

    @property
    def tasks(self) -> list[str]:
        """The task of each row, as the caller named it; an empty text if the caller did not."""
        ...

    @property
    def hidden(self) -> Tensor:
        """The last hidden states `[B, S, H]` that the base alone computes for these tokens."""
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of the rows."""
        ...


# A function from rows to weights over the recipe's experts: `[B, E]`, or `[B, k]` for k chosen ones,
# or `[E]` for all rows alike. A router by token returns `[B, S, L, E]` for L layers; with L = 1 the
# weights hold for all layers.
Select = Callable[[Batch], Weights]


def _load_no_embedder(name: str) -> Embedder:
    """Refuse to load an encoder, because none is offered."""
    raise ValueError(f"expected an embedder {name!r}, found none here")


@dataclass(frozen=True, eq=False)
class Pool:
    """All experts of a recipe, as a router of the whole model sees them.

    Args:
        labels: The experts' names in the recipe.
        tasks: The tasks that each expert was trained on; empty if they are unknown.
        state: The tensors that the router prepared.
        load_embedder: A function that loads a sentence encoder by name. It refuses an encoder that
            did not make the index.
        n_layers: The number of layers of the model that have something to route; None if unknown.
    """

    labels: tuple[str, ...] = ()
    tasks: tuple[tuple[str, ...], ...] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)
    load_embedder: Callable[[str], Embedder] = _load_no_embedder
    n_layers: int | None = None

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
