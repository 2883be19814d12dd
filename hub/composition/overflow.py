"""Detection of numbers that overflow while a composed model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from experthub.hub.composition.composition import Composition
from experthub.hub.errors import IntegrityError
from torch import Tensor


@contextmanager
def refuse_overflow(composition: Composition) -> Iterator[None]:
    """Refuse the outputs of a composed model during the block if they are not numbers.

    A logit may be minus infinity, because some models mask tokens in this way.

    Args:
        composition: The composition.

    Yields:
        Nothing.

    Raises:
        IntegrityError: The model computes NaN or infinity. The message names the first module in
            whose output they occur.
    """

    def check(model: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
        found = getattr(output, "logits", None)
        found = getattr(output, "last_hidden_state", None) if found is None else found
        if found is None or bool((found < torch.inf).all()):  # NaN is not less than anything.
            return
        handle.remove()  # The search calls the model again.
        place = _find_first(model, args, inputs)
        dtype = composition.plan.dtype
        raise IntegrityError(
            "the composed model computes NaN or infinity"
            + (f"; they occur first in the output of {place}" if place else ""),
            "set smaller weights for the experts in the recipe"
            if dtype == "float32"
            else "set dtype: float32 in the recipe",
        )

    handle = composition.model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _find_first(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> str:
    """Run the model again, and return the first module whose output is not finite, or nothing."""
    first: list[str] = []

    def watch(path: str, module: Any) -> Any:
        def after(_: Any, given: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if not first and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                first.append(path)

        return module.register_forward_hook(after)

    # Without a cache: that of the first run has these tokens already.
    again = {k: v for k, v in inputs.items() if k not in ("past_key_values", "cache_position")}
    handles = [watch(path, module) for path, module in model.named_modules() if path]
    try:
        model(*args, **again)
    finally:
        for handle in handles:
            handle.remove()
    return "".join(first)
