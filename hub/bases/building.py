"""Building of models with transformers: no progress bars, no network, one kind of error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from logging import LogRecord, getLogger
from threading import Lock, get_ident
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.model_size import limit_model_size
from experthub.hub.errors import HubError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import FLOATS
from experthub.hub.transfer.remotes.no_network import forbid_network

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# The blocks that hide progress bars now, and whether bars were shown before the first of them.
_hiding, _shown, _progress_bars = 0, True, Lock()


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block; the hub shows its own.

    The setting is one of the process, so the last of several threads restores it.

    Yields:
        Nothing.
    """
    global _hiding, _shown
    from transformers.utils import logging

    with _progress_bars:
        if not _hiding:
            _shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
        _hiding += 1
    try:
        yield
    finally:
        with _progress_bars:
            _hiding -= 1
            if _shown and not _hiding:
                logging.enable_progress_bar()


@contextmanager
def hide_report() -> Iterator[None]:
    """Hide the table of missing and unused weights inside the block, in this thread only.

    Yields:
        Nothing.
    """
    own = get_ident()

    def is_shown(record: LogRecord) -> bool:
        return get_ident() != own or "LOAD REPORT" not in record.getMessage()

    logger = getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


@contextmanager
def explain_loading_errors(base: Base, errors: Any, what: str = "load") -> Iterator[None]:
    """Turn errors that transformers raises while it loads or saves a base into a HubError.

    Args:
        base: The base.
        errors: The classes of the errors.
        what: What transformers does, for the message.

    Yields:
        Nothing.

    Raises:
        HubError: One of the errors was raised in the block.
    """
    try:
        with hide_progress_bars(), forbid_network():
            yield
    except errors as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(
            f"base {base.name}: transformers cannot {what} it: {reason}",
            f"check the files in {base.folder}; code that comes with a model is never run",
        ) from None


def list_loading_errors() -> tuple[type[Exception], ...]:
    """List the errors that transformers raises if it cannot load or save a model.

    Returns:
        The classes of the errors.
    """
    strict: type[Exception] = import_module("huggingface_hub.errors").StrictDataclassError
    wrong = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*wrong, OSError, RuntimeError, TypeError, ValueError, strict)


def build_model(
    base: Base, kind: Any, config: Any, weights: dict[str, Any], **options: Any
) -> tuple[Any, list[str], list[str]]:
    """Build a model from the weights that are given.

    Transformers gets no folder: in a folder it would find other files than those that were checked.

    Args:
        base: The base.
        kind: The class of transformers.
        config: The configuration.
        weights: The weights by their stored names.
        **options: More arguments of `from_pretrained`.

    Returns:
        The model, and the names of the missing and of the unused weights.

    Raises:
        HubError: Transformers cannot build the model.
    """
    with explain_loading_errors(base, list_loading_errors()), limit_size(base), hide_report():
        model, found = kind.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **options, **LOCAL
        )
        model.name_or_path = model.config.name_or_path = str(base.folder)
        if model.can_generate():
            model.generation_config = _read_generation_config(base)
    return model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])


def _read_generation_config(base: Base) -> Any:
    """Read the settings of generation, from their own file or else from the model's configuration."""
    from transformers import GenerationConfig

    own = base.folder / "generation_config.json"
    if own.is_file():
        return GenerationConfig.from_dict(read_json(own))
    return GenerationConfig.from_model_config(read_json(base.folder / "config.json"))


def limit_size(base: Base) -> AbstractContextManager[None]:
    """Stop the building of a model that is much larger than the base's files.

    Args:
        base: The base.

    Returns:
        The context in which the model is built.
    """
    entries = sum(map(math.prod, base.shapes.values()))
    # Quantised weights are packed: one stored integer holds several entries.
    packed = 1 if base.dtype in FLOATS and base.quantisation is None else 16
    return limit_model_size(base.name, len(base.shapes), packed * entries)


def find_class(base: Base) -> tuple[Any, Any]:
    """Find the transformers class that a base's configuration names, and load the configuration.

    Args:
        base: The base.

    Returns:
        The class, and the configuration.

    Raises:
        HubError: Transformers has no such class, or cannot read the configuration.
    """
    import transformers

    kind: Any = getattr(transformers, base.architecture or "-", None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise HubError(
            f"base {base.name}: transformers has no class {base.architecture or '(none stated)'}",
            f"name a class of transformers under architectures in {base.folder / 'config.json'}",
        )
    with explain_loading_errors(base, list_loading_errors()):
        config = transformers.AutoConfig.from_pretrained(base.folder, **LOCAL)
    if base.quantisation and base.quantisation.dequantised:
        config.quantization_config["dequantize"] = True
    return kind, config


def list_shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """List the shapes of a model's parameters before they were quantised.

    Args:
        base: The base, whose stored tensors are packed.

    Returns:
        Parameter name -> shape.

    Raises:
        HubError: Transformers has no class for the base.
    """
    kind, config = find_class(base)
    errors = explain_loading_errors(base, list_loading_errors())
    with torch.device("meta"), errors, limit_size(base):
        parameters = kind(config).named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in parameters}
