"""The modules and parameters of a model before it is composed, to restore them."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModelState:
    """The modules and parameters of a model; their tensors are shared, not copied.

    Args:
        model: A transformers model.
    """

    def __init__(self, model: Any) -> None:
        modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._modules = {
            name: (module, dict(module._parameters), _list_sizes(module))
            for name, module in modules.items()
        }
        self._config = model.config

    def restore(self, model: Any) -> None:
        """Give a model the modules and parameters that it had.

        Args:
            model: The same model, which is changed in place.
        """
        model.config = self._config
        for name, (module, parameters, sizes) in self._modules.items():
            if name:
                model.set_submodule(name, module)
            module._parameters.update(parameters)
            vars(module).update(sizes)


def _list_sizes(module: nn.Module) -> dict[str, int]:
    """Return the numbers that a module has as attributes, such as those of its rows."""
    return {name: value for name, value in vars(module).items() if type(value) is int}
