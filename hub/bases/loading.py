"""Loading of base models and their tokenizers with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import (
    LOCAL,
    build_model,
    explain_loading_errors,
    find_class,
    limit_size,
    list_loading_errors,
)
from experthub.hub.bases.fingerprint import compute_fingerprint, list_weight_files
from experthub.hub.bases.identity import compute_base_digest
from experthub.hub.bases.quantised import check_loadable
from experthub.hub.bases.tokenizer import CheckedTokenizer
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.formats.safetensors_reader import DTYPES
from experthub.hub.transfer.remotes.no_network import forbid_network
from experthub.merge import is_linear, is_transposed
from safetensors import safe_open


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
    check_loadable(base)
    where = {"": device or "cpu"} if base.quantisation else None
    model, missing, _ = build_model(base, kind, config, weights, dtype=dtype, device_map=where)
    refuse_missing(base, missing)
    check_unchanged(base)
    if where is None:
        model = model.to(device or "cpu")
    elif base.quantisation and base.quantisation.dequantised:
        model._weight_conversions = None  # Transformers would quantise the weights when it saves.
    return model.eval().requires_grad_(False)


def compare_names(base: Base) -> tuple[list[str], list[str]]:
    """Compare the weights that a base's model has with those that its files have.

    No weight is read: the model is built without storage. The packed weights of a quantised base
    are compared only when they are loaded.

    Args:
        base: The base.

    Returns:
        The names of the model's weights that the files lack, and of the stored weights that the
        model does not use.

    Raises:
        HubError: Transformers cannot build the model, or a shape differs.
    """
    if base.quantisation is not None:
        return [], []
    kind, config = find_class(base)
    empty = {
        name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32), device="meta")
        for file in list_weight_files(base.folder)
        for name, info in read_header(file).items()
    }
    _, missing, unused = build_model(base, kind, config, empty, dtype="float32", device_map="meta")
    return missing, unused


def refuse_missing(base: Base, missing: Sequence[str]) -> None:
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
            f"{base.architecture}, such as {missing[0]}",
            f"correct {base.folder / 'config.json'}, or save the whole model again",
        )


def check_unchanged(base: Base) -> None:
    """Check that the files of a base are still those that were read when it was found.

    Args:
        base: The base.

    Raises:
        IntegrityError: A file was changed.
    """
    if base.digest != compute_base_digest(base.folder, compute_fingerprint(base.folder)):
        raise IntegrityError(
            f"base {base.name}: files in {base.folder} were changed while it was loaded",
            "run the command again when nothing writes to the folder",
        )


def load_tokenizer(base: Base) -> Any:
    """Load the tokenizer of a base.

    Args:
        base: The base.

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
    check_unchanged(base)
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
    kind, config = find_class(base)
    with torch.device("meta"), forbid_network(), limit_size(base):
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
