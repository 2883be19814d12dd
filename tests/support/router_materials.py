"""Materials for routers on random numbers, for tests over the whole catalogue."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from experthub.merge import Strategy
from experthub.routing import ExpertStack, Pool, RouterTraits, Weights
from torch import Tensor, nn

WIDTH, FEATURES, LAYERS = 8, 6, 2
LABELS = ("e0", "e1", "e2")
MODULE = "layers.0.linear"


def drawn(key: str, *shape: int) -> Tensor:
    """Random numbers that depend on a text alone."""
    seed = zlib.crc32(key.encode())
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class TextEmbedder:
    """Unit embeddings that depend on each text alone."""

    fingerprint: str = "sha256:" + "0" * 64

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [drawn(text, 5) for text in texts]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


@dataclass(frozen=True)
class Rows:
    """Rows that a composed model is about to read."""

    texts: list[str]
    tasks: list[str]
    hidden: Tensor

    def place(self, tensor: Tensor) -> Tensor:
        return tensor

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.texts[rows], self.tasks[rows], self.hidden[rows])


def some_rows() -> Rows:
    """Four rows of three tokens; the third is of an unknown task."""
    tasks = ["t0", "e1", "of nobody", "t2"]
    return Rows([f"a text {i}" for i in range(4)], tasks, drawn("hidden", 4, 3, FEATURES))


@dataclass
class RoutedData:
    """Labelled data read by a model whose only parameters are a router's state."""

    select: Callable[[Rows], Weights]
    sizes: tuple[int, ...] = (9, 7)
    tasks: tuple[str, ...] = ("t0", "t1")
    labels: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.labels = [torch.arange(n) % 3 for n in self.sizes]

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        """Mix random logits of the experts by the router's weights of the last token."""
        found = []
        for task, chosen in enumerate(rows):
            hidden = drawn(f"data {task}", self.sizes[task], 3, FEATURES)[chosen]
            given = Rows([f"{task} {i}" for i in chosen.tolist()], [""] * len(chosen), hidden)
            if not len(chosen):
                found.append(torch.empty(0, 3))
                continue
            values = self.select(given).values
            while values.ndim > 2:
                values = values[:, -1]
            experts = drawn(f"logits {task}", self.sizes[task], len(LABELS), 3)[chosen]
            found.append((values[..., None] * experts).sum(1))
        return found


@dataclass
class RandomMaterials:
    """Everything that `experthub.routing.RouterMaterials` offers, on random numbers."""

    strategy: Strategy[RouterTraits]
    options: Mapping[str, Any]
    labels: tuple[str, ...] = LABELS
    n_layers: int = LAYERS
    n_features: int = FEATURES

    def report(self, what: str, done: int, size: int) -> None:
        assert what and 0 <= done <= size

    def load_embedder(self, name: str) -> TextEmbedder:
        return TextEmbedder()

    def read_texts(self, expert: int) -> list[str]:
        return [f"example {i} of expert {expert}" for i in range(5)]

    def read_activations(self, expert: int, see: Callable[[str, Tensor], None]) -> None:
        for batch in range(2):
            see(MODULE, drawn(f"inputs {expert} {batch}", 6, WIDTH))

    def read_logits(self, expert: int) -> list[Tensor]:
        return [drawn(f"own logits {expert} {task}", n, 3) for task, n in enumerate((9, 7))]

    def read_answers(self) -> list[Tensor]:
        return [torch.arange(n) % 3 for n in (9, 7)]

    def compose(self, state: Mapping[str, Tensor]) -> RoutedData:
        return RoutedData(self.strategy.call(pool_of(state), **self.options))

    def place(self, tensor: Tensor) -> Tensor:
        return tensor


def pool_of(state: Mapping[str, Tensor]) -> Pool:
    """Three experts, each of a task of its own."""
    return Pool(LABELS, (("t0",), ("t1",), ("t2",)), state, lambda name: TextEmbedder())


def bind(strategy: Strategy[RouterTraits]) -> dict[str, Any]:
    """The defaults of a router; one that is trained is so for few steps."""
    few = {"steps": 3, "size": 4}
    return strategy.bind({name: value for name, value in few.items() if name in strategy.options})


def prepare(
    strategy: Strategy[RouterTraits], labels: tuple[str, ...] = LABELS
) -> Mapping[str, Tensor]:
    """The tensors of a router's state; none for a router without state."""
    if strategy.prepare is None:
        return {}
    options = bind(strategy)
    state = strategy.prepare(RandomMaterials(strategy, options, labels), options)
    tensors: Mapping[str, Tensor] = state.tensors
    return tensors


def with_state(strategy: Strategy[RouterTraits], stack: ExpertStack) -> dict[str, Any]:
    """Make the tensors that a router finds in its stack besides the experts."""
    labels = tuple(f"e{e}" for e in range(stack.n_experts))
    return {"module": MODULE, "labels": labels, "state": prepare(strategy, labels)}
