"""Loading of base models and their tokenizers with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.tokenizer import CheckedTokenizer
from experthub.hub.errors import HubError, UsageError
from experthub.merge import is_linear, is_transposed

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(base: Base, dtype: str, device: str | None) -> Any:
    """Load a base as a frozen transformers model in eval mode.

    Args:
        base: The base.
        dtype: `float32`, `bfloat16` or `float16`.
        device: The torch device of the model. None means `cpu`.

    Returns:
        The model, in the class that the base's configuration names.

    Raises:
        UsageError: Torch cannot use the device here.
        HubError: Transformers cannot load the base.
    """
    check_device(device)
    kind, config = _find_class(base)
    with _explain_loading_errors(base, _list_loading_errors()):
        model = kind.from_pretrained(base.folder, config=config, dtype=dtype, **LOCAL)
    return model.to(device or "cpu").eval().requires_grad_(False)


def load_tokenizer(base: Base) -> Any:
    """Load the tokenizer of a base.

    Args:
        base: The base.

    Returns:
        The tokenizer, as transformers loads it, with errors that name the base.

    Raises:
        HubError: The base has no tokenizer, or transformers cannot load it.
    """
    if not base.has_tokenizer:
        raise HubError(
            f"base {base.name} has no tokenizer, which reading and writing text needs; "
            "composing works without one",
            f"copy the files of its tokenizer into {base.folder}",
        )
    from transformers import AutoTokenizer

    # The package tokenizers raises Exception itself, so that no narrower class can be named.
    with _explain_loading_errors(base, (Exception,)):
        found = AutoTokenizer.from_pretrained(base.folder, **LOCAL)
    return CheckedTokenizer(found, base.name, base.folder, base.shapes)


def find_linear_modules(base: Base) -> dict[str, bool]:
    """Find the linear layers of a base.

    Args:
        base: The base; its weights are not read.

    Returns:
        Module path -> whether the weight is stored transposed, as `[I, O]` (Conv1D).

    Raises:
        HubError: Transformers has no class for the base.
    """
    kind, config = _find_class(base)
    with torch.device("meta"):
        modules = kind(config).named_modules()
    return {name: is_transposed(module) for name, module in modules if is_linear(module)}


def check_device(device: str | None) -> None:
    """Check that torch can use a device here.

    Args:
        device: The name of the device. None means `cpu`.

    Raises:
        UsageError: Torch cannot use it.
    """
    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"cannot use the device {device!r}: {str(error).splitlines()[0]}",
            "use cpu, or install a torch that supports the device",
        ) from None


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block; the hub shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _find_class(base: Base) -> tuple[Any, Any]:
    """Find the transformers class that a base's configuration names, and load the configuration."""
    import transformers

    kind: Any = getattr(transformers, base.architecture or "-", None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise HubError(
            f"base {base.name}: transformers has no class {base.architecture or '(none stated)'}",
            f"name a class of transformers under architectures in {base.folder / 'config.json'}",
        )
    with _explain_loading_errors(base, _list_loading_errors()):
        return kind, transformers.AutoConfig.from_pretrained(base.folder, **LOCAL)


@contextmanager
def _explain_loading_errors(base: Base, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn errors that transformers raises while it loads a base into a HubError."""
    try:
        with hide_progress_bars():
            yield
    except errors as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(
            f"base {base.name}: transformers cannot load it: {reason}",
            f"check the files in {base.folder}; code that comes with a model is never run",
        ) from None


def _list_loading_errors() -> tuple[type[Exception], ...]:
    """List the errors that transformers raises if it cannot load a model."""
    strict: type[Exception] = import_module("huggingface_hub.errors").StrictDataclassError
    wrong = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*wrong, OSError, RuntimeError, TypeError, ValueError, strict)
