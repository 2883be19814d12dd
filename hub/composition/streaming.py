"""Writing a merged model tensor by tensor, without the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.building import (
    build_model,
    explain_loading_errors,
    find_class,
    list_loading_errors,
    refuse_missing,
)
from experthub.hub.bases.fingerprint import list_weight_files
from experthub.hub.bases.writing import copy_companions
from experthub.hub.composition.assembly import add_change, check_orientation, merge_experts
from experthub.hub.composition.weights import Contents
from experthub.hub.errors import explain_errors
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import create_folder, write_json, write_text
from experthub.hub.files.path_checks import check_free
from experthub.hub.formats.safetensors_header import TensorInfo, read_header
from experthub.hub.formats.safetensors_reader import DTYPES, read_tensor
from experthub.hub.formats.safetensors_writer import SafetensorsLayout, Writer, create_safetensors
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.transfer.pull import pull
from experthub.merge import Delta, TaskVector
from torch import Tensor

MAX_SHARD = 5 << 30  # bytes of one file of a written model
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Stored = dict[str, tuple[Path, TensorInfo]]


def write_merge(plan: Plan, session: Session, state: Any, folder: Path) -> bool:
    """Write the merged model of a plan, reading and writing one tensor after the other.

    The bytes of every tensor are those that `Composition.save` writes. This works if transformers
    saves the model under the names in the base's files. It does not work for a route, for tied
    embeddings that an expert changes, for weights and tokens that only the experts have, and for
    layers that transformers fuses when it loads them.

    Args:
        plan: The plan.
        session: The store and the progress callback.
        state: The state of the plan's method; None for a method without state.
        folder: A new or empty folder.

    Returns:
        True if the model was written; False if it has to be composed in memory.

    Raises:
        IntegrityError: The content of an expert is damaged, or a merged weight overflows.
        HubError: The experts do not fit the model.
        ConflictError: The folder is in use.
    """
    check_free(folder)
    if plan.base.quantisation is not None or any(unit.recipe.route for unit in plan.units):
        return False
    if plan.completes_base or any(unit.dense for unit in plan.units):
        return False
    stored: Stored = {
        name: (file, info)
        for file in list_weight_files(plan.base.folder)
        for name, info in read_header(file).items()
    }
    model = _build_empty(plan, stored)
    saved = _list_saved(model, plan, stored)
    if saved is None:
        return False
    pull(session, *(member.content for member in plan.members))
    with Contents(plan.members, session.store, gates=False) as contents:
        check_orientation(model, plan)
        merged: dict[str, Callable[[], Delta]] = {}
        for unit in plan.units:
            method = unit.recipe.method.method
            with torch.no_grad(), explain_errors(method):
                vector = merge_experts(unit, contents, state)
                merged |= {name: partial(_compute_change, vector, name, method) for name in vector}
        with create_folder(folder) as draft:
            with explain_loading_errors(plan.base, list_loading_errors(), "save"):
                model.save_pretrained(draft, state_dict={})
            _write_weights(draft, saved, stored, merged, plan, session)
            copy_companions(plan.base, draft)
            write_text(draft / "recipe.lock.yaml", yaml_files.dump(plan.lock))
    return True


def _compute_change(vector: TaskVector, name: str, method: str) -> Delta:
    """Compute the change of one parameter, which a lazy merge does only when it is asked for it."""
    with explain_errors(method):
        return vector[name]


def _build_empty(plan: Plan, stored: Stored) -> Any:
    """Build the model of a plan without storage, in its dtype."""
    kind, config = find_class(plan.base)
    empty = {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        for name, (_, info) in stored.items()
    }
    options = {"dtype": plan.dtype, "device_map": "meta"}
    model, missing, _ = build_model(plan.base, kind, config, empty, **options)
    refuse_missing(plan.base, missing)
    return model.eval()


def _list_saved(model: Any, plan: Plan, stored: Stored) -> dict[str, Tensor] | None:
    """List the tensors to write, without storage; None if they are not those of the files."""
    state = model.state_dict()
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    twins = [names for names in shared.values() if len(names) > 1]
    if any(name in plan.parameters for names in twins for name in names):
        return None
    dropped = {name for names in twins for name in names if name not in stored}
    saved = {name: tensor for name, tensor in state.items() if name not in dropped}
    used = stored.keys() - set(plan.unused)
    fits = saved.keys() == used and set(plan.parameters) <= used
    fits = fits and all(stored[name][1].shape == tuple(t.shape) for name, t in saved.items())
    return saved if fits and not getattr(model, "_weight_conversions", None) else None


def _write_weights(
    folder: Path,
    saved: dict[str, Tensor],
    stored: Stored,
    merged: dict[str, Callable[[], Delta]],
    plan: Plan,
    session: Session,
) -> None:
    """Write the weights into one file, or into several with an index."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(saved):
        if shards[-1] and size + saved[name].nbytes > MAX_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += saved[name].nbytes
    places: dict[str, str] = {}
    count, done = len(shards), 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        tensors = {n: (NAMES[saved[n].dtype], tuple(saved[n].shape)) for n in names}
        layout = SafetensorsLayout(tensors, {"format": "pt"})
        with create_safetensors(folder / file, layout) as writer, torch.no_grad():
            for name in sorted(names, key=lambda name: layout.places[name]):
                _write_tensor(writer, name, stored[name], saved[name].dtype, merged.get(name), plan)
                done += 1
                session.report("writing the model", done, len(saved))
        places |= dict.fromkeys(names, file)
    if count > 1:
        total = sum(tensor.nbytes for tensor in saved.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _write_tensor(
    writer: Writer,
    name: str,
    place: tuple[Path, TensorInfo],
    dtype: torch.dtype,
    change: Callable[[], Delta] | None,
    plan: Plan,
) -> None:
    """Read a tensor, add its change, and write it."""
    tensor = read_tensor(*place)
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if change is not None:
        tensor = add_change(tensor, change(), name, plan.dtype)
    writer.put(name, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
