"""Loading of base models and their tokenizers with transformers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from logging import LogRecord, getLogger
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.fingerprint import compute_fingerprint, list_weight_files
from experthub.hub.bases.identity import compute_base_digest
from experthub.hub.bases.model_size import limit_model_size
from experthub.hub.bases.tokenizer import CheckedTokenizer, add_tokens
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import FLOATS, read_header
from experthub.hub.formats.safetensors_reader import DTYPES
from experthub.hub.transfer.remotes.no_network import forbid_network
from experthub.merge import is_linear, is_transposed
from safetensors import safe_open

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# The blocks that hide progress bars now, and whether bars were shown before the first of them.
_hiding, _shown, _progress_bars = 0, True, Lock()


def load_model(base: Base, dtype: str, device: str | None) -> Any:
    """Load a base as a frozen transformers model in eval mode.

    Args:
        base: The base. Weights that it lacks, and that experts bring along, are zero.
        dtype: `float32`, `bfloat16` or `float16`.
        device: The torch device of the model. None means `cpu`.

    Returns:
        The model, in the class that the base's configuration names.

    Raises:
        UsageError: Torch cannot use the device here.
        IntegrityError: The files lack a weight of the model, or were changed since they were read.
        HubError: Transformers cannot load the base.
    """
    check_device(device)
    kind, config = find_class(base)
    weights: dict[str, Any] = {}
    with explain_loading_errors(base, list_loading_errors()):
        for file in list_weight_files(base.folder):
            stored: Any = safe_open(file, "pt")
            weights |= {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
    model, missing, _ = _build(base, kind, config, weights, dtype=dtype)
    refuse_missing(base, [name for name in missing if name not in base.lacks])
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    _check_unchanged(base)
    return model.to(device or "cpu").eval().requires_grad_(False)


def compare_names(base: Base) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Compare the weights that a base's model has with those that its files have.

    No weight is read: the model is built without storage.

    Args:
        base: The base.

    Returns:
        The model's weights that the files lack, with their shapes, and the names of the stored
        weights that the model does not use.

    Raises:
        HubError: Transformers cannot build the model, or a shape differs.
    """
    kind, config = find_class(base)
    empty = {
        name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32), device="meta")
        for file in list_weight_files(base.folder)
        for name, info in read_header(file).items()
    }
    model, missing, unused = _build(base, kind, config, empty, dtype="float32", device_map="meta")
    own = model.state_dict()
    return {name: tuple(own[name].shape) for name in missing}, unused


def refuse_missing(base: Base, missing: Collection[str]) -> None:
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


def _build(
    base: Base, kind: Any, config: Any, weights: dict[str, Any], **options: Any
) -> tuple[Any, list[str], list[str]]:
    """Build a model from the weights that are given; also return the missing and the unused names.

    Transformers gets no folder: in a folder it would find other files than those that were checked.
    """
    with explain_loading_errors(base, list_loading_errors()), _limit_size(base), _hide_report():
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


def _check_unchanged(base: Base) -> None:
    """Check that the files of a base are still those that were read when it was found."""
    if base.digest != compute_base_digest(base.folder, compute_fingerprint(base.folder)):
        raise IntegrityError(
            f"base {base.name}: files in {base.folder} were changed while it was loaded",
            "run the command again when nothing writes to the folder",
        )


def load_tokenizer(base: Base) -> Any:
    """Load the tokenizer of a base.

    Args:
        base: The base. The tokens that experts add to it are added.

    Returns:
        The tokenizer, as transformers loads it, with errors that name the base.

    Raises:
        IntegrityError: A file was changed since the base was found.
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
    with explain_loading_errors(base, (Exception,)):
        found = AutoTokenizer.from_pretrained(base.folder, **LOCAL)
        if base.added is not None:
            add_tokens(found, base.added.tokens)
    _check_unchanged(base)
    rows = base.added.rows if base.added else None
    return CheckedTokenizer(found, base.name, base.folder, base.shapes, rows)


def write_model(base: Base, model: Any, folder: Path) -> None:
    """Write the configurations and the weights of a model that was made from a base.

    Args:
        base: The base.
        model: The model.
        folder: The folder.

    Raises:
        HubError: Transformers cannot save the model.
    """
    with explain_loading_errors(base, list_loading_errors(), "save"):
        model.save_pretrained(folder)


def find_linear_modules(base: Base) -> dict[str, bool]:
    """Find the linear layers of a base.

    Args:
        base: The base; its weights are not read.

    Returns:
        Module path -> whether the weight is stored transposed, as `[I, O]` (Conv1D).

    Raises:
        HubError: Transformers has no class for the base.
    """
    kind, config = find_class(base)
    with torch.device("meta"), forbid_network(), _limit_size(base):
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


def _limit_size(base: Base) -> AbstractContextManager[None]:
    """Stop the building of a model that is much larger than the base's files."""
    entries = sum(map(math.prod, base.shapes.values()))
    # Quantised weights are packed: one stored integer holds several entries.
    packed = 1 if base.dtype in FLOATS else 16
    return limit_model_size(base.name, len(base.shapes), packed * entries)


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


def find_class(base: Base) -> tuple[Any, Any]:
    """Find the transformers class that a base's configuration names, and load the configuration."""
    import transformers

    kind: Any = getattr(transformers, base.architecture or "-", None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise HubError(
            f"base {base.name}: transformers has no class {base.architecture or '(none stated)'}",
            f"name a class of transformers under architectures in {base.folder / 'config.json'}",
        )
    with explain_loading_errors(base, list_loading_errors()):
        return kind, transformers.AutoConfig.from_pretrained(base.folder, **LOCAL)


@contextmanager
def explain_loading_errors(base: Base, errors: Any, what: str = "load") -> Iterator[None]:
    """Turn errors that transformers raises while it loads or saves a base into a HubError."""
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
    """List the errors that transformers raises if it cannot load a model."""
    strict: type[Exception] = import_module("huggingface_hub.errors").StrictDataclassError
    wrong = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*wrong, OSError, RuntimeError, TypeError, ValueError, strict)
