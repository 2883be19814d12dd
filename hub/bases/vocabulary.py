"""The parameters of a base whose rows are tokens, and models with more of them."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import find_class
from experthub.hub.transfer.remotes.no_network import forbid_network


def find_vocabulary(base: Base) -> frozenset[str]:
    """Find the parameters of a base whose rows are tokens.

    Args:
        base: The base; no weight is read.

    Returns:
        The names of the parameters that transformers resizes with the vocabulary.
    """
    return _find_vocabulary(_Digested(base))


class _Digested:
    """A base, compared by its digest."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def __hash__(self) -> int:
        return hash(self.base.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Digested) and self.base.digest == other.base.digest


@lru_cache(maxsize=8)
def _find_vocabulary(digested: _Digested) -> frozenset[str]:
    """Build the model without storage, resize it, and compare the shapes."""
    kind, config = find_class(digested.base)
    with torch.device("meta"), forbid_network():
        model: Any = kind(copy.deepcopy(config))
        inputs = model.get_input_embeddings()
        if inputs is None or not hasattr(inputs, "num_embeddings"):
            return frozenset()
        before = _list_shapes(model)
        resize_model(model, inputs.num_embeddings + 1)
    return frozenset(n for n, shape in _list_shapes(model).items() if shape != before.get(n))


def _list_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, tied ones included."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(parameter.shape) for name, parameter in named}


def resize_model(model: Any, rows: int) -> None:
    """Give the embeddings of a model more or fewer rows. The content of new rows is not defined.

    Args:
        model: A transformers model, which is changed in place. Its configuration is copied before.
        rows: The number of rows.
    """
    model.config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.requires_grad_(False)
