"""Writing the changes of an adapter as a LoRA in PEFT's format or as a task vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experthub.hub.conversion.base_weights import StoredBase
from experthub.hub.conversion.changes import Changes
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import write_json
from experthub.hub.finetunes.form import Form
from experthub.hub.finetunes.lora import write_lora
from experthub.hub.finetunes.two_models import ChangedParameter, Pair, StoredWeights
from experthub.hub.finetunes.vector import write_task_vector
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG
from experthub.hub.formats.adapter_writer import write_adapter
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.formats.lora_config import list_ignored_keys
from experthub.hub.progress import Report
from experthub.merge import Dense, LowRank, truncate
from safetensors.torch import save_file
from torch import Tensor


def write_renamed(changes: Changes, folder: Path) -> dict[str, Any]:
    """Write a plain LoRA with the names that peft saves; every tensor keeps its bits.

    Args:
        changes: The changes of a LoRA.
        folder: The folder to write into.

    Returns:
        The figures of the report.
    """
    adapter = changes.adapter
    names = [name for name in adapter.tensors if not _is_ignored(name, changes)]
    tensors = {name: adapter.tensors[name].contiguous() for name in names}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config = {"peft_type": "LORA"} | adapter.config
    for key in list_ignored_keys(config):
        del config[key]
    config |= {"bias": "none"} if "bias" in config else {}  # There are no tensors of biases.
    write_json(folder / ADAPTER_CONFIG, config)
    return {"relative_error": 0.0}


def _is_ignored(name: str, changes: Changes) -> bool:
    """Tell whether only training uses a tensor."""
    return any(f".{ending}" in name for ending in changes.kind.ignored)


def write_low_rank(
    changes: Changes, base: StoredBase, folder: Path, rank: int | None, dtype: str
) -> dict[str, Any]:
    """Write changes of low rank as a LoRA of the same rank, or of a given one.

    Args:
        changes: The changes, of a type that is low-rank.
        base: The weights of the base.
        folder: The folder to write into.
        rank: The largest rank of a module, by SVD. None keeps every change exact.
        dtype: The dtype of the factors.

    Returns:
        The figures of the report: the relative error and the ranks.

    Raises:
        IntegrityError: A change overflows the dtype.
    """
    kept = getattr(torch, dtype)
    config, others = changes.adapter.config, {}
    tensors: dict[str, Tensor] = {}
    total = missed = 0.0
    ranks = []
    for path, delta in _name_errors(changes):
        if not isinstance(delta, LowRank):
            raise TypeError(f"{changes.kind.name} is declared low-rank, and {path} is dense")
        low = truncate(_shorten(delta), rank) if rank else _shorten(delta)
        a, b = low.a.to(kept), (low.b * low.scale).to(kept)
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise IntegrityError(
                f"{changes.adapter.name}: the change of {path} overflows {dtype}, or is not finite",
                "use --dtype float32, or train the adapter again",
            )
        whole = delta.dense()
        total += float(whole.square().sum())
        missed += float((whole - b.double() @ a.double()).square().sum())
        ranks.append(low.rank)
        embedding = "lora_embedding_A" in changes.modules[path].tensors
        first, second = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else (
                "lora_A.weight",
                "lora_B.weight",
            )
        )
        tensors[f"{PREFIX}{path}.{first}"], tensors[f"{PREFIX}{path}.{second}"] = a, b
    for at in changes.dense.values():
        others[at] = changes.adapter.tensors[at]
    write_adapter(
        folder,
        tensors,
        base=str(config.get("base_model_name_or_path") or ""),
        task_type=config.get("task_type"),
        transposed=bool(config.get("fan_in_fan_out")),
        pad=False,
        dense=others,
        keys={k: config[k] for k in ("modules_to_save",) if config.get(k)},
    )
    return {
        "relative_error": _ratio(missed, total),
        "ranks": {"min": min(ranks), "max": max(ranks)},
    }


def _shorten(delta: LowRank) -> LowRank:
    """Return a change with a rank that is not above the sides of its weight, without rounding."""
    outputs, inputs = delta.shape
    if delta.rank <= min(outputs, inputs):
        return delta
    whole = delta.dense()
    if outputs <= inputs:
        return LowRank(whole, torch.eye(outputs, dtype=whole.dtype))
    return LowRank(torch.eye(inputs, dtype=whole.dtype), whole)


def _ratio(missed: float, total: float) -> float:
    """Return the relative error, rounded to four digits."""
    return float(f"{math.sqrt(missed / total) if total else 0.0:.4g}")


def write_dense(
    changes: Changes, base: StoredBase, folder: Path, form: Form, report: Report
) -> dict[str, Any]:
    """Write changes as a task vector, or as a LoRA if the form has a rank.

    The changed model is read parameter by parameter, as `hub diff` reads a fine-tuned model.

    Args:
        changes: The changes.
        base: The weights of the base.
        folder: The folder to write into.
        form: The form.
        report: A progress callback.

    Returns:
        The figures of the report.

    Raises:
        HubError: The base lacks a parameter, or a change overflows the dtype.
    """
    deltas = _list_parameters(changes, base)
    found = base.base

    def read(name: str) -> Tensor:
        delta, value = deltas[name], base.parameter(name)
        with _explain(changes, name):
            return value if delta is None else value + delta()

    tuned = StoredWeights(changes.adapter.name, found.shapes, read, {}, found.tied)
    changed = []
    for name in sorted(deltas):
        shape = found.shapes[name]
        changed.append(ChangedParameter(Pair(name, found.tied.get(name, name), name), shape, 1))
    if form.low_rank:
        error, more = write_lora(
            folder, found, base.stored, tuned, changed, base.linear, form, report
        )
    else:
        error = write_task_vector(folder, found, base.stored, tuned, changed, form, report)
        more = {}
    return error.record() | more


def _list_parameters(changes: Changes, base: StoredBase) -> dict[str, Callable[[], Tensor] | None]:
    """Return for each changed parameter a function that computes its change as it is stored."""
    deltas: dict[str, Callable[[], Tensor] | None] = {}
    for path, module in changes.modules.items():
        base.parameter(f"{path}.weight")  # Its error names the module.
        deltas[f"{path}.weight"] = partial(_compute_stored, changes, base, path)
        with _explain(changes, path):
            bias = changes.kind.bias(module)
        if bias is not None:
            base.parameter(f"{path}.bias")
            deltas[f"{path}.bias"] = partial(torch.clone, bias)
    for name, at in changes.dense.items():
        before = base.parameter(name)
        after = changes.adapter.tensors[at].double()
        if before.shape != after.shape:
            raise HubError(
                f"{changes.adapter.name} has {name} {list(after.shape)}, "
                f"and {base.base.name} has {list(before.shape)}",
                "use the base that the adapter was trained on",
            )
        if not torch.equal(before, after):
            deltas[name] = partial(torch.sub, after, before)
    for use, held in base.base.tied.items():
        if held in deltas and use not in deltas and held not in changes.dense:
            deltas[use] = None  # The adapter changes one use of the weight only.
    return deltas


def _compute_stored(changes: Changes, base: StoredBase, path: str) -> Tensor:
    """Compute the change of a module's weight in the orientation in which the base stores it."""
    delta = changes.kind.change(changes.modules[path])
    dense = delta.d if isinstance(delta, Dense) else delta.dense()
    return dense.T if dense.ndim == 2 and base.is_transposed(path) else dense


def _name_errors(changes: Changes) -> Iterator[tuple[str, Any]]:
    """Compute the changes of all modules; errors name the adapter and the module."""
    for path, module in changes.modules.items():
        with _explain(changes, path):
            yield path, changes.kind.change(module)


@contextmanager
def _explain(changes: Changes, path: str) -> Iterator[None]:
    """Turn errors of tensors that do not fit each other into an IntegrityError."""
    try:
        yield
    except KeyError as error:
        raise IntegrityError(
            f"{changes.adapter.name}: {path} has no tensor {error.args[0]}",
            "check that the file is complete",
        ) from None
    except (ArithmeticError, RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(
            f"{changes.adapter.name}: the tensors of {path} do not fit each other: {reason}",
            "use the base that the adapter was trained on, or save the adapter again",
        ) from None
