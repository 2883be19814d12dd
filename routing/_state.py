"""Reading the stored tensors of a router's state, which may be damaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from experthub.merge import MethodError
from torch import Tensor


class StateError(MethodError):
    """An error for a stored state that cannot be what the method prepared.

    Args:
        message: What was expected, and what was found.
        hint: The next step: a sentence that starts with a verb.
    """

    is_damage = True

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint or "get the state again, or make it again with hub router")


class StateTensors(dict[str, Tensor]):
    """The tensors of a state by name. Reading one that is missing raises StateError."""

    def __missing__(self, name: str) -> Tensor:
        raise StateError(f"the state has no tensor {name!r}")


def read_tensor(
    state: Mapping[str, Tensor],
    name: str,
    *shape: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Read a tensor of a state, and check it.

    Args:
        state: The tensors by name.
        name: The name of the tensor.
        *shape: The size of each dimension; None accepts any size from 1 on.
        dtype: The dtype of the tensor.

    Returns:
        The tensor.

    Raises:
        StateError: The tensor is missing, or has another shape or dtype.
    """
    found = state.get(name)
    if found is None:
        raise StateError(f"the state has no tensor {name!r}")
    fits = found.dtype == dtype and found.ndim == len(shape)
    if not fits or any(
        size < 1 if side is None else size != side
        for side, size in zip(shape, found.shape, strict=True)
    ):
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise StateError(
            f"the tensor {name!r} of the state is {found.dtype} {list(found.shape)}, "
            f"expected {dtype} [{sides}]"
        )
    return found
