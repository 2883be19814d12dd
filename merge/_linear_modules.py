"""Linear modules: the one place that knows how they store their weights.

A `torch.nn.Linear` stores `[O, I]`. A Conv1D of transformers, as in GPT-2, stores `[I, O]`.

Shapes: I inputs and O outputs of a module, R the rank of a change.
"""

from __future__ import annotations

from typing import cast

import torch
from experthub.merge._delta import LowRank
from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is a Conv1D, whose weight is stored as `[I, O]`.

    Args:
        module: Any module. Its class is compared by name, because transformers is not imported here.

    Returns:
        True for a Conv1D.
    """
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes `W x + b`, however its weight is stored.

    Args:
        module: Any module.

    Returns:
        True for a linear layer (or a subclass of one) and for a Conv1D.
    """
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose own `forward` computes the product.

    Subclasses of `torch.nn.Linear` are excluded. Some owners read the weight of such a module
    without a call of `forward`, so that a forward hook would never run.

    Args:
        module: Any module.

    Returns:
        True for a `torch.nn.Linear` itself and for a Conv1D.
    """
    return type(module) is nn.Linear or is_transposed(module)


def make_like(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Make an empty tensor of the dtype and on the device in which a linear module computes.

    The weight of a quantised module is packed in integers, so that its dtype says nothing.

    Args:
        module: The linear module.
        dtype: The dtype of its model, for a module whose weight is packed.

    Returns:
        A tensor without entries.
    """
    weight = cast(Tensor, module.weight)
    own = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else dtype
    # The weight of a module that accelerate offloaded comes to this device when it is called.
    where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.empty(0, dtype=own, device=weight.device if where is None else where)


def orient(change: LowRank, module: nn.Module) -> LowRank:
    """Turn the change of a module's stored weight into `A [R, I]` and `B [O, R]`.

    Args:
        change: The change in the orientation of the stored weight.
        module: The linear module.

    Returns:
        The same change with `B A` in the orientation `[O, I]`.
    """
    return change.transpose() if is_transposed(module) else change
