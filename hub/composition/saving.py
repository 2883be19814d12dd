"""Refusal to save a routed model as one set of weights, which would be those of its base."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from experthub.hub.errors import UsageError
from torch import nn

SAVING = ("save_pretrained", "push_to_hub")  # Methods of transformers' models.


class SaveRefusal:
    """A function in place of the methods that save a model."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to save the model.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "a routed model cannot be saved as one set of weights",
            "compose the recipe where the model is used, or write merge: instead of route:",
        )


refuse_save = SaveRefusal()


def refuse_saving(model: nn.Module) -> None:
    """Let a routed model refuse to be saved, and warn if its state dict is read.

    The state dict is that of the base, and a routed model can load it.

    Args:
        model: The composed model, which is changed in place.
    """
    for module in model.modules():
        for name in SAVING:
            if hasattr(module, name):
                setattr(module, name, refuse_save)
    model.register_state_dict_pre_hook(_warn)  # type: ignore[no-untyped-call]


def allow_saving(model: nn.Module) -> None:
    """Undo `refuse_saving`.

    Args:
        model: The composed model, which is changed in place.
    """
    for module in model.modules():
        for name in SAVING:
            vars(module).pop(name, None)
    hooks = model._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _warn]:
        del hooks[key]


def _warn(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Warn that a state dict has no experts."""
    warnings.warn(
        "the state dict of a routed model holds the weights of the base alone, without its experts; "
        "compose the recipe where the model is used",
        stacklevel=3,
    )
