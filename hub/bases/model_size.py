"""A limit on models that are built from a configuration: they have no more than their files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from experthub.hub.errors import IntegrityError
from torch import nn

SLACK_TENSORS = 1000  # Tied weights, and buffers such as causal masks, are not stored.
SLACK_ENTRIES = 1 << 28


@contextmanager
def limit_model_size(name: str, tensors: int, entries: int) -> Iterator[None]:
    """Stop the building of a model that is much larger than its weight files.

    Without this limit, a configuration with three million layers keeps a computer busy for hours.

    Args:
        name: The name of the base in errors.
        tensors: The number of tensors in its files.
        entries: The number of entries of all these tensors.

    Yields:
        Nothing.

    Raises:
        IntegrityError: A model in the block has more than twice as many tensors or entries.
    """
    own, counts = threading.get_ident(), [0, 0]
    limits = [2 * tensors + SLACK_TENSORS, 2 * entries + SLACK_ENTRIES]

    def count(module: nn.Module, key: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != own:
            return
        counts[0] += 1
        counts[1] += tensor.numel()
        if counts[0] > limits[0] or counts[1] > limits[1]:
            raise IntegrityError(
                f"base {name}: its config.json describes a model with more than "
                f"{min(counts[0], limits[0])} tensors and {min(counts[1], limits[1])} entries, "
                f"but its files have {tensors} tensors with {entries} entries",
                "correct the sizes in config.json, or fetch the base again",
            )

    hooks = nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
