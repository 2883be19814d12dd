"""Recording of the weights that routed modules compute in the forward passes of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from experthub.routing._routed_linear import RoutedLinear
from torch import Tensor, nn

# The recordings of this thread; other threads may run the same model.
_recorded: ContextVar[tuple[dict[str, list[Tensor]], ...]] = ContextVar("recorded", default=())


@contextmanager
def record_routing(
    model: nn.Module, n_experts: int, is_wanted: Callable[[str], bool] = lambda path: True
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the weights of routed modules inside the block.

    Only calls of this thread and of this asyncio task are recorded; other threads may run the model
    at the same time.

    Args:
        model: The composed model. It gets forward hooks, which are removed at the end.
        n_experts: The number of experts E of the recipe.
        is_wanted: A function of a module's path that returns whether to record the module.

    Yields:
        Module path -> the weights `[T, E]` of the T inputs of each call, in the order of the calls.
        They are float32, on the CPU, and zero for experts that do not adapt the module. Calls that
        the base answers without experts are not recorded.
    """
    found: dict[str, list[Tensor]] = {}
    handles, before = [], _recorded.get()

    def watch(module: RoutedLinear, calls: list[Tensor]) -> Any:
        """Add a forward hook to one module."""
        places = torch.tensor(module.experts)

        # The hook runs after the module, which keeps what it computed about a row.
        def after(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            """Record the weights of one call."""
            if not any(one is found for one in _recorded.get()) or module.group.context.off:
                return
            with torch.no_grad():
                own_TE = module.compute_weights(inputs[0]).reshape(-1, len(places)).float().cpu()
            calls.append(own_TE.new_zeros(len(own_TE), n_experts).index_copy_(1, places, own_TE))

        return module.register_forward_hook(after)

    try:
        for path, module in model.named_modules():
            if isinstance(module, RoutedLinear) and is_wanted(path):
                handles.append(watch(module, found.setdefault(path, [])))
        _recorded.set((*before, found))
        yield found
    finally:
        _recorded.set(before)
        for handle in handles:
            handle.remove()
