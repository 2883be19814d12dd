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
        if found is not None and not _are_numbers(found):
            handle.remove()  # The search calls the model again.
            raise _explain_overflow(composition, args, inputs)

    handle = composition.model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_logits(composition: Composition, ids: Tensor, logits: Tensor) -> Tensor:
    """Refuse logits that are not numbers, at a step of `generate`.

    Unlike `refuse_overflow`, it adds nothing to the model, which other threads may use.

    Args:
        composition: The composition.
        ids: The ids `[B, S]` of the tokens so far.
        logits: The logits `[B, vocabulary]` of the next tokens.

    Returns:
        The logits.

    Raises:
        IntegrityError: A logit is NaN or infinity. The message names the first module in whose
            output they occur.
    """
    if not _are_numbers(logits):
        raise _explain_overflow(composition, (), {"input_ids": ids})
    return logits


def _are_numbers(values: Tensor) -> bool:
    """Tell whether no value is NaN or infinity. NaN is not less than anything."""
    return bool((values < torch.inf).all())


def _explain_overflow(
    composition: Composition, args: tuple[Any, ...], inputs: dict[str, Any]
) -> IntegrityError:
    """Make the error for a model that computes NaN or infinity for these inputs."""
    place = _find_first(composition.model, args, inputs)
    return IntegrityError(
        "the composed model computes NaN or infinity"
        + (f"; they occur first in the output of {place}" if place else ""),
        "set smaller weights for the experts in the recipe"
        if composition.plan.dtype == "float32"
        else "set dtype: float32 in the recipe",
    )


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
