"""The rows that a composed model is about to read, and the routers that decide for whole rows.

Shapes: B rows, S tokens, H hidden features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import torch
from experthub.hub.errors import UsageError
from experthub.routing import Context, Select, Weights
from torch import Tensor

# The tasks of the rows, by the model that they were named for. A model is shared by threads, so they
# are kept by thread and by asyncio task.
named_tasks: ContextVar[Mapping[str, tuple[str, ...]]] = ContextVar(
    "named tasks", default=MappingProxyType({})
)
# Whether the rows are those of a call of `generate`, which repeats each row for several beams.
repeated: ContextVar[bool] = ContextVar("repeated", default=False)


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass, which implement `experthub.routing.Batch`.

    Args:
        ids: The inputs `[B, S]`.
        real: A mask `[B, S]` of the tokens that are not padding.
        model: The name of the model under which the caller names tasks.
        read_texts: A function that decodes `ids` and `real` into texts.
        read_hidden: A function that computes the base's last hidden states.
    """

    ids: Tensor
    real: Tensor
    model: str
    read_texts: Callable[[Tensor, Tensor], list[str]] | None
    read_hidden: Callable[[], Tensor] | None = None

    @property
    def texts(self) -> list[str]:
        """The text of each row."""
        if self.read_texts is None:
            raise UsageError(
                "the router reads texts, which it was not registered for",
                "add needs=('texts',) to its routers.register(...)",
            )
        if self.ids.is_floating_point():
            raise UsageError(
                "the router reads texts, and the model got embeddings", "pass input_ids"
            )
        return self.read_texts(self.ids, self.real)

    @property
    def tasks(self) -> list[str]:
        """The task of each row; an empty text if the caller named none."""
        rows, named = len(self.ids), named_tasks.get().get(self.model)
        if named is None:
            return [""] * rows
        each = rows // len(named)
        if len(named) not in (1, rows) and not (repeated.get() and each * len(named) == rows):
            raise UsageError(
                f"{len(named)} tasks were named for a batch of {rows} rows",
                "name one task for each row, or one for all rows",
            )
        return [name for name in named for _ in range(each)]

    @property
    def hidden(self) -> Tensor:
        """The last hidden states `[B, S, H]` of the base alone."""
        if self.read_hidden is None:
            raise UsageError(
                "the router reads hidden states, which it was not registered for",
                "register it with routing=Routing('token', 'model')",
            )
        return self.read_hidden()

    def place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of the rows.

        Args:
            tensor: Any tensor.

        Returns:
            The tensor on that device.
        """
        return tensor.to(self.ids.device)


@dataclass(eq=False)
class RouteHook:
    """One route of a composed model, as the model's forward hooks see it.

    Args:
        context: The link from the routed modules to the forward pass.
        select: A router that decides for the whole model; None if all decide at their modules.
        by_token: Whether `select` returns weights for every token of every forward pass. Otherwise
            it returns weights for rows, once, when their first tokens are read.
        read_texts: A function that decodes token ids `[B, S]` and a mask of real tokens into texts.
        n_experts: The number of experts E if `select` reads texts or tasks, which no graph of
            torch.compile can hold. A graph then calls the hook by its number.
    """

    context: Context
    select: Select | None = None
    by_token: bool = False
    read_texts: Callable[[Tensor, Tensor], list[str]] | None = None
    n_experts: int | None = None

    def __post_init__(self) -> None:
        self.number = next(_numbers)
        _hooks[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which gets a number of its own."""
        vars(self).update(state)
        self.__post_init__()

    def choose(self, rows: Rows) -> Weights:
        """Return the weights of rows.

        Args:
            rows: The rows.

        Returns:
            The weights that `select` returns.

        Raises:
            ValueError: The route has no router of the whole model.
        """
        if self.select is None:
            raise ValueError("expected a router of the whole model, found one of each module")
        if self.n_experts is None or not torch.compiler.is_compiling():
            return self.select(rows)
        return Weights(_choose(rows.ids, rows.real, self.number, rows.model, self.n_experts))


_numbers = count()
_hooks: WeakValueDictionary[int, RouteHook] = WeakValueDictionary()


@torch.library.custom_op("experthub::choose", mutates_args=())
def _choose(ids: Tensor, real: Tensor, number: int, model: str, n_experts: int) -> Tensor:
    """Compute the weights `[B, E]` of rows when a compiled graph runs."""
    hook = _hooks[number]
    rows = Rows(ids, real, model, hook.read_texts)
    found = hook.select(rows).dense(n_experts) if hook.select else torch.empty(0)
    return found.expand(len(ids), n_experts).contiguous()


@_choose.register_fake
def _(ids: Tensor, real: Tensor, number: int, model: str, n_experts: int) -> Tensor:
    """Describe the weights for the compiler."""
    return ids.new_empty(len(ids), n_experts, dtype=torch.float32)
