"""Loading of base models and their tokenizers with transformers."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import (
    LOCAL,
    build_model,
    explain_loading_errors,
    find_class,
    list_loading_errors,
    refuse_missing,
)
from experthub.hub.bases.fingerprint import compute_fingerprint, list_weight_files
from experthub.hub.bases.identity import compute_base_digest
from experthub.hub.bases.quantised import check_loadable
from experthub.hub.bases.tokenizer import CheckedTokenizer, add_tokens
from experthub.hub.errors import HubError, IntegrityError, UsageError
from safetensors import safe_open

AUTO = "auto"  # The device of a model that accelerate divides among devices, memory and disk.


def load_model(base: Base, dtype: str, device: str | None) -> Any:
    """Load a base as a frozen transformers model in eval mode.

    Args:
        base: The base. Weights that it lacks, and that experts bring along, are zero.
        dtype: `float32`, `bfloat16` or `float16`.
        device: The torch device of the model. None means `cpu`. `auto` lets accelerate divide the
            model among all devices, the memory and the disk.

    Returns:
        The model, in the class that the base's configuration names.

    Raises:
        UsageError: Torch cannot use the device here.
        IntegrityError: The files lack a weight of the model, or were changed since they were read.
        HubError: Transformers cannot load the base.
    """
    check_device(device)
    check_loadable(base)
    kind, config = find_class(base)
    weights: dict[str, Any] = {}
    with explain_loading_errors(base, list_loading_errors()):
        for file in list_weight_files(base.folder):
            stored: Any = safe_open(file, "pt")
            weights |= {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
    where = AUTO if device == AUTO else {"": device or "cpu"} if base.quantisation else None
    placing: dict[str, Any] = {"dtype": dtype, "device_map": where}
    offloaded = TemporaryDirectory(prefix="experthub-") if device == AUTO else None
    if offloaded is not None:
        placing["offload_folder"] = offloaded.name
    model, missing, _ = build_model(base, kind, config, weights, **placing)
    model._offloaded = offloaded  # The folder is removed when the model is.
    refuse_missing(base, [] if base.completed else missing)
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    check_unchanged(base)
    if where is None:
        model = model.to(device or "cpu")
    elif base.quantisation and base.quantisation.dequantised:
        model._weight_conversions = None  # Transformers would quantise the weights when it saves.
    return model.eval().requires_grad_(False)


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
    check_unchanged(base)
    rows = base.added.rows if base.added else None
    return CheckedTokenizer(found, base.name, base.folder, base.stored, rows)


def check_device(device: str | None) -> None:
    """Check that torch can use a device here.

    Args:
        device: The name of the device. None means `cpu`; `auto` is always possible.

    Raises:
        UsageError: Torch cannot use it.
    """
    try:
        torch.empty(0, device=device if device and device != AUTO else "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"cannot use the device {device!r}: {str(error).splitlines()[0]}",
            "use cpu, or install a torch that supports the device",
        ) from None
