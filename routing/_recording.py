"""What routed modules decide, written down while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from experthub.routing._routed_linear import RoutedLinear
from torch import Tensor, nn


@contextmanager
def recorded(
    model: nn.Module, n_experts: int, wanted: Callable[[str], bool] = lambda path: True
) -> Iterator[dict[str, list[Tensor]]]:
    """The weights of every routed module, for as long as the block lasts; nothing stays of it.

    n_experts: E, how many experts the recipe has.  wanted: which modules, by path.  Yields module
    path -> the weights `[T, E]` of each call's T inputs, float32, on the CPU, in the order of the
    calls; zero where an expert does not adapt the module.  Calls without experts are not counted.
    """
    found: dict[str, list[Tensor]] = {}
    handles = []

    def watch(module: RoutedLinear, calls: list[Tensor]) -> Any:
        places = torch.tensor(module.experts)

        # After the module: what it found out about a row is kept, and is not found by another kernel.
        def after(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.group.context.off:
                return
            with torch.no_grad():
                own_TE = module.routing(inputs[0]).reshape(-1, len(places)).float().cpu()
            calls.append(own_TE.new_zeros(len(own_TE), n_experts).index_copy_(1, places, own_TE))

        return module.register_forward_hook(after)

    try:
        for path, module in model.named_modules():
            if isinstance(module, RoutedLinear) and wanted(path):
                handles.append(watch(module, found.setdefault(path, [])))
        yield found
    finally:
        for handle in handles:
            handle.remove()
