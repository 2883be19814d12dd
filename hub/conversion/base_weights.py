"""The weights of a base as converters need them: by module, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.finetunes.two_models import StoredWeights, open_weights
from torch import Tensor


class StoredBase:
    """The stored weights of a base.

    Args:
        find: A function that finds the base; it is called when a weight or a shape is needed.
        adapter: The adapter, for errors.
    """

    def __init__(self, find: Callable[[], Base], adapter: str) -> None:
        self._find, self.adapter = find, adapter

    @cached_property
    def base(self) -> Base:
        """The base."""
        return self._find()

    @cached_property
    def stored(self) -> StoredWeights:
        """The weights in the files of the base."""
        return open_weights(self.base)

    @property
    def linear(self) -> Mapping[str, bool]:
        """Linear module -> whether its weight is stored transposed."""
        return self.base.names.linear

    def holds(self, name: str) -> bool:
        """Tell whether the base has a parameter.

        Args:
            name: The parameter.

        Returns:
            True if it is stored, or tied to a stored one.
        """
        return name in self.base.shapes

    def parameter(self, name: str) -> Tensor:
        """Return a parameter as it is stored, in float64.

        Args:
            name: The parameter.

        Returns:
            The tensor.

        Raises:
            HubError: The base has no such parameter.
            IntegrityError: The parameter is quantised.
        """
        held = self.base.tied.get(name, name)
        if held not in self.stored.shapes:
            if held in self.stored.others:
                raise IntegrityError(
                    f"{name} of {self.base.name} is quantised, and the change needs its true values",
                    "use the base that the quantised one was made from: hub convert --base BASE",
                )
            raise HubError(
                f"{self.adapter} adapts {name}, which {self.base.name} does not have",
                "use the base that the adapter was trained on",
            )
        return self.stored.read(held).double()

    def is_transposed(self, module: str) -> bool:
        """Tell whether the weight of a module is stored as `[I, O]`: Conv1D and embeddings.

        Args:
            module: The path of the module.

        Returns:
            True for such a module.
        """
        return self.linear.get(module, True)

    def weight(self, module: str) -> Tensor:
        """Return the weight of a module as `[O, I]`, or of an embedding as `[width, tokens]`.

        Args:
            module: The path of the module.

        Returns:
            The matrix in float64.
        """
        found = self.parameter(f"{module}.weight")
        return found.T.contiguous() if self.is_transposed(module) else found

    def bias(self, module: str) -> Tensor | None:
        """Return the bias of a module.

        Args:
            module: The path of the module.

        Returns:
            The vector in float64, or None if the module has none.
        """
        name = f"{module}.bias"
        return self.parameter(name) if self.holds(name) else None

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape of the weight of a module.

        Args:
            module: The path of the module.

        Returns:
            The number of outputs and of inputs.

        Raises:
            HubError: The base has no such matrix.
        """
        shape = self.base.shapes.get(f"{module}.weight", ())
        if len(shape) != 2:
            raise HubError(
                f"{self.adapter} adapts {module}, and {self.base.name} has no such matrix",
                "use the base that the adapter was trained on",
            )
        return (shape[1], shape[0]) if self.is_transposed(module) else (shape[0], shape[1])
