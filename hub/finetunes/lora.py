"""Write a difference as a LoRA in PEFT's format: a truncated SVD of each linear module's change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.errors import HubError
from experthub.hub.finetunes.form import ApproximationError, Form, check_kept
from experthub.hub.finetunes.two_models import ChangedParameter, StoredWeights, read_pair
from experthub.hub.formats.adapter_writer import write_adapter
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.progress import Report
from experthub.merge import Dense, LowRank, truncate
from torch import Tensor


def write_lora(
    folder: Path,
    base: Base,
    untouched: StoredWeights,
    tuned: StoredWeights,
    changed: list[ChangedParameter],
    transposed: Mapping[str, bool],
    form: Form,
    report: Report,
) -> tuple[ApproximationError, dict[str, Any]]:
    """Write the two files of a LoRA.

    Args:
        folder: The folder to write into.
        base: The base.
        untouched: The base's weights.
        tuned: The fine-tuned weights.
        changed: The parameters that differ.
        transposed: Linear module -> whether its weight is stored transposed, `[I, O]`.
        form: The form, with a rank or an energy.
        report: A progress callback.

    Returns:
        The error of the LoRA, and its number of modules and their ranks.

    Raises:
        HubError: No linear module has changed, or a change is too large for the dtype.
    """
    modules = _find_modules(changed, transposed, base.name)
    conv = any(transposed[module] for module in modules.values())
    dtype: torch.dtype = getattr(torch, form.dtype)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    error = ApproximationError()
    for i, change in enumerate(changed):
        name = change.pair.name
        read = read_pair(change.pair, untouched, tuned)
        if name in modules:
            found = truncate(Dense(read.delta), form.rank, form.energy)
            low = LowRank(found.a.to(dtype), found.b.to(dtype))
            if not bool(torch.isfinite(low.a).all() and torch.isfinite(low.b).all()):
                raise HubError(
                    f"the change of {name} overflows {form.dtype}", "use --dtype float32"
                )
            dense = low.b.float() @ low.a.float()
            check_kept(name, read.delta, dense, form)
            error.add(name, read, dense)
            place = PREFIX + modules[name]
            stored = low.transpose() if conv else low
            tensors[f"{place}.lora_A.weight"] = stored.a
            tensors[f"{place}.lora_B.weight"] = stored.b
            ranks[modules[name]] = low.rank
        else:
            error.add(name, read, None)
        report("decomposing the difference", i + 1, len(changed))
    write_adapter(
        folder,
        tensors,
        base=base.public_name,
        task_type=base.peft_task_type,
        model_class=base.architecture,
        transposed=conv,
        pad=False,
    )
    mean = sum(ranks.values()) / len(ranks)
    spread = {"min": min(ranks.values()), "mean": round(mean, 1), "max": max(ranks.values())}
    return error, {"modules": len(ranks), "ranks": spread}


def _find_modules(
    changed: list[ChangedParameter], transposed: Mapping[str, bool], base: str
) -> dict[str, str]:
    """Return parameter -> module for the linear weights that changed, all of one orientation.

    An adapter has one `fan_in_fan_out`: if a Conv1D has changed, other linear modules are left out.
    """
    weights = {f"{module}.weight": module for module in transposed}
    names = [c.pair.name for c in changed if c.entries and c.pair.name in weights]
    if not names:
        raise HubError(
            f"no linear module of {base} has changed, and a LoRA holds only those",
            "store the difference without --rank and --energy, or with --sparse",
        )
    conv = any(transposed[weights[name]] for name in names)
    return {name: weights[name] for name in names if transposed[weights[name]] == conv}
