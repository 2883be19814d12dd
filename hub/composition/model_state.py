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
        self._modules = {name: (m, dict(m._parameters)) for name, m in modules.items()}
        self._config = model.config

    def restore(self, model: Any) -> None:
        """Give a model the modules and parameters that it had.

        Args:
            model: The same model, which is changed in place.
        """
        model.config = self._config
        for name, (module, parameters) in self._modules.items():
            if name:
                model.set_submodule(name, module)
            module._parameters.update(parameters)
