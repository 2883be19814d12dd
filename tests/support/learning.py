"""A model of three weights and random inputs of two tasks, for tests of learned merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from experthub.merge import Data, MergeMaterials, Strategy, TaskVector
from torch import Tensor, nn

SHAPES = {"a.weight": (6, 5), "b.weight": (4, 6), "c.weight": (3, 3)}


class Tiny(nn.Module):
    """Two linear layers, and a third that nothing depends on."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(7)
        for name, (o, i) in SHAPES.items():
            self.add_module(name[0], nn.Linear(i, o, bias=False))
        self.requires_grad_(False).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@dataclass
class TinyData:
    """Random inputs; a view adds noise that depends on its number."""

    model: nn.Module = field(default_factory=Tiny)
    sizes: tuple[int, ...] = (24, 16)
    labelled: bool = False
    held_out: Any = None
    tasks: tuple[str, ...] = ("first", "second")
    real: Tensor | None = None
    x_tND: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(3)
        dtype = next(self.model.parameters()).dtype
        self.x_tND = [torch.randn(n, 5, generator=random).to(dtype) for n in self.sizes]
        self.answers = [torch.randint(4, (n,), generator=random) for n in self.sizes]

    @property
    def labels(self) -> list[Tensor] | None:
        return self.answers if self.labelled else None

    def logits(self, rows: Sequence[Tensor], view: int = 0) -> list[Tensor]:
        inputs = []
        for x_ND, r in zip(self.x_tND, rows, strict=True):
            noise = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(view))
            inputs.append((x_ND + (0.1 * noise if view else 0.0))[r].to(x_ND))
        return list(self.model(torch.cat(inputs)).split([len(r) for r in rows]))


def make_data(dtype: torch.dtype = torch.float32, count: int = 2, **options: Any) -> TinyData:
    """Make labelled and held-out data of so many tasks."""
    sizes, tasks = (24, 16, 12)[:count], ("first", "second", "third")[:count]
    data = TinyData(Tiny(dtype), sizes, labelled=True, tasks=tasks, **options)
    data.held_out = TinyData(data.model, (9, 7, 5)[:count], labelled=True, tasks=tasks)
    return data


def make_materials(
    given: Sequence[TaskVector], data: Data | None = None, **surroundings: Any
) -> MergeMaterials:
    """Offer experts of weight 1, data and a random search; `surroundings` are other fields."""
    materials = MergeMaterials(given, torch.ones(len(given)), data, random_search)
    return replace(materials, **surroundings)


def prepare_merge(
    strategy: Strategy[Any],
    given: Sequence[TaskVector],
    weights: Tensor,
    source: Data | MergeMaterials | None = None,
    **options: Any,
) -> Any:
    """Return the state of a merge; `source` is its data, or materials whose experts are replaced."""
    materials = source if isinstance(source, MergeMaterials) else make_materials(given, source)
    assert strategy.prepare is not None
    materials = replace(materials, vectors=given, weights=weights)
    return strategy.prepare(materials, strategy.bind(options))


def run_merge(
    strategy: Strategy[Any],
    given: Sequence[TaskVector],
    weights: Tensor,
    source: Data | MergeMaterials | None = None,
    **options: Any,
) -> TaskVector:
    """Prepare the state of a merge, if it has one, and call the merge; see `prepare_merge`."""
    state: tuple[Any, ...] = ()
    if strategy.prepare is not None:
        state = (prepare_merge(strategy, given, weights, source, **options),)
    merged: TaskVector = strategy.call(given, weights, *state, **strategy.bind(options))
    return merged


def random_search(loss: Any, start: Any, bound: float, evaluations: int, seed: int) -> list[float]:
    """The best of random points, and of the start."""
    random = torch.Generator().manual_seed(seed)
    points = [list(start)]
    points += [
        (bound * (2 * torch.rand(len(start), generator=random) - 1)).tolist()
        for _ in range(evaluations - 1)
    ]
    return min(points, key=loss)


def literal(
    model: nn.Module, vectors: Sequence[TaskVector], values: Tensor, blocks: Any
) -> dict[str, Tensor]:
    """`W0 + sum c tau` written out, differentiable in values `[E, B]`."""
    weights = {}
    for name, weight in model.named_parameters():
        weights[name] = weight.detach()
        for e, vector in enumerate(vectors):
            if name in vector:
                weights[name] = weights[name] + values[e, blocks[name]] * vector[name].dense().to(
                    weight
                )
    return weights
