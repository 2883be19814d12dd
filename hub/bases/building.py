"""Building of models from weights that are given, with transformers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from logging import LogRecord, getLogger
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, Protocol

import torch
from experthub.hub.bases.config_types import check_files, find_unknown_value, prepare_config
from experthub.hub.bases.fingerprint import list_weight_files
from experthub.hub.bases.model_size import limit_model_size
from experthub.hub.errors import LIBRARY_ERRORS, HubError, IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.quantisation import Quantisation
from experthub.hub.formats.safetensors_header import FLOATS, read_header
from experthub.hub.formats.safetensors_reader import DTYPES
from experthub.hub.transfer.remotes.no_network import forbid_network

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# The blocks that hide progress bars now, and whether bars were shown before the first of them.
_hiding, _shown, _progress_bars = 0, True, Lock()


class StoredModel(Protocol):
    """The properties of a base that decide which model is built from it."""

    @property
    def name(self) -> str:
        """The name in errors."""
        ...

    @property
    def folder(self) -> Path:
        """The model folder."""
        ...

    @property
    def architecture(self) -> str:
        """The class of transformers."""
        ...

    @property
    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each stored tensor."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype that most tensors are stored in, as safetensors names it."""
        ...

    @property
    def quantisation(self) -> Quantisation | None:
        """The way in which the weights are quantised; None if they are not."""
        ...

    @property
    def is_causal(self) -> bool:
        """True for a causal language model."""
        ...

    @property
    def digest(self) -> str:
        """The digest of everything that changes what the base computes."""
        ...


def build_empty(base: StoredModel) -> tuple[Any, list[str], list[str]]:
    """Build the model of a base without storage; no weight is read.

    Args:
        base: The base.

    Returns:
        The model on the device `meta`, the names of its weights that the files lack, and the names
        of the stored weights that it does not use.

    Raises:
        HubError: Transformers cannot build the model, or a shape differs.
    """
    kind, config = find_class(base)
    if base.quantisation is not None:  # The packed weights are compared when they are loaded.
        errors = explain_loading_errors(base, list_loading_errors())
        with torch.device("meta"), errors, limit_size(base):
            return kind(config).eval(), [], []
    empty = {
        name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32), device="meta")
        for file in list_weight_files(base.folder)
        for name, info in read_header(file).items()
    }
    return build_model(base, kind, config, empty, dtype="float32", device_map="meta")


def refuse_missing(base: StoredModel, missing: Collection[str]) -> None:
    """Refuse a base whose files lack weights, which transformers would make up at random.

    Args:
        base: The base.
        missing: The names of the missing weights.

    Raises:
        IntegrityError: There are missing weights.
    """
    if missing:
        raise IntegrityError(
            f"base {base.name}: its files lack {len(missing)} of the weights of "
            f"{base.architecture}, such as {min(missing)}",
            f"correct {base.folder / 'config.json'}, or save the whole model again",
        )


def build_model(
    base: StoredModel, kind: Any, config: Any, weights: dict[str, Any], **options: Any
) -> tuple[Any, list[str], list[str]]:
    """Build a model from the weights that are given; also return the missing and the unused names.

    Transformers gets no folder: in a folder it would find other files than those that were checked.

    Args:
        base: The base.
        kind: The class of transformers.
        config: Its configuration.
        weights: The weights by their stored names.
        **options: More options of `from_pretrained`.

    Returns:
        The model, the names of its weights that are not given, and the names of the given weights
        that it does not use.

    Raises:
        HubError: Transformers cannot build the model, or a shape differs.
    """
    with explain_loading_errors(base, list_loading_errors()), limit_size(base), _hide_report():
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = kind.from_pretrained(
            None, config=config, state_dict=weights, **options, **LOCAL
        )
        model.name_or_path = model.config.name_or_path = str(base.folder)
        if model.can_generate():
            model.generation_config = _read_generation_config(base)
    for name, own, described in sorted(found["mismatched_keys"]):
        raise HubError(
            f"base {base.name}: {name} is {list(own)} in its files, but {list(described)} in the "
            "model that its config.json describes",
            "correct the sizes in config.json, such as vocab_size after the vocabulary was resized",
        )
    return model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])


def _read_generation_config(base: StoredModel) -> Any:
    """Read the settings of generation, from their own file or else from the model's configuration."""
    from transformers import GenerationConfig

    own = base.folder / "generation_config.json"
    if own.is_file():
        return GenerationConfig.from_dict(read_json(own))
    return GenerationConfig.from_model_config(read_json(base.folder / "config.json"))


def limit_size(base: StoredModel) -> AbstractContextManager[None]:
    """Stop the building of a model that is much larger than the base's files.

    Args:
        base: The base.

    Returns:
        The block in which the model is built.
    """
    sizes = [math.prod(shape) for shape in base.stored.values()]
    entries = sum(sizes) + max(sizes, default=0)  # Tied embeddings are stored once.
    # Quantised weights are packed: one stored integer holds several entries.
    packed = 1 if base.dtype in FLOATS and base.quantisation is None else 16
    return limit_model_size(base.name, len(base.stored), packed * entries)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block; the hub shows its own.

    The setting is one of the process, so the last of several threads restores it.
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
def _hide_report() -> Iterator[None]:
    """Hide the table of missing and unused weights inside the block, in this thread only."""
    own = get_ident()

    def is_shown(record: LogRecord) -> bool:
        return get_ident() != own or "LOAD REPORT" not in record.getMessage()

    logger = getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def find_class(base: StoredModel) -> tuple[Any, Any]:
    """Find the transformers class that a base's configuration names, and load the configuration.

    Args:
        base: The base.

    Returns:
        The class and the configuration.

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
    file = base.folder / "config.json"
    check_files(base.folder)
    with explain_loading_errors(base, list_loading_errors()):
        config = transformers.AutoConfig.from_pretrained(base.folder, **LOCAL)
    prepare_config(config, file)
    if base.quantisation is not None and base.quantisation.dequantised:
        config.quantization_config["dequantize"] = True
    return kind, config


@contextmanager
def explain_loading_errors(base: StoredModel, errors: Any, what: str = "load") -> Iterator[None]:
    """Turn errors that transformers raises while it loads or saves a base into a HubError.

    Args:
        base: The base.
        errors: The types of the errors.
        what: What transformers does: `load` or `save`.

    Yields:
        Nothing.

    Raises:
        IntegrityError: A value in the configuration has the wrong type.
        HubError: Transformers raised another of these errors.
    """
    try:
        with hide_progress_bars(), forbid_network():
            yield
    except errors as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        unknown = find_unknown_value(error, base.folder / "config.json")
        if unknown or isinstance(error, _find_strict_error()):  # It names a key of config.json.
            raise IntegrityError(
                f"base {base.name}: {base.folder / 'config.json'} has a wrong value: "
                f"{unknown or reason}",
                "correct the value, or fetch the base again",
            ) from None
        raise HubError(
            f"base {base.name}: transformers cannot {what} it: {reason}",
            f"check the files in {base.folder}; code that comes with a model is never run",
        ) from None


def list_loading_errors() -> tuple[type[Exception], ...]:
    """List the errors that transformers raises if it cannot load a model.

    Returns:
        The types of the errors.
    """
    return (*LIBRARY_ERRORS, _find_strict_error())


def _find_strict_error() -> type[Exception]:
    """Return the error for a value in a configuration that has the wrong type."""
    found: type[Exception] = import_module("huggingface_hub.errors").StrictDataclassError
    return found
