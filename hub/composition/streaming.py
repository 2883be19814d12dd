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
from experthub.hub.bases.name_map import revert_names
from experthub.hub.bases.names import Piece, Place, is_covered, join_pieces
from experthub.hub.bases.writing import copy_companions
from experthub.hub.composition.assembly import add_change, merge_experts
from experthub.hub.composition.weights import Contents
from experthub.hub.errors import explain_errors
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import create_folder, write_json, write_text
from experthub.hub.files.path_checks import check_free
from experthub.hub.formats.safetensors_header import TensorInfo, read_header
from experthub.hub.formats.safetensors_reader import DTYPES, read_tensor
from experthub.hub.formats.safetensors_writer import SafetensorsLayout, create_safetensors
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.transfer.pull import pull
from experthub.merge import Delta, TaskVector
from torch import Tensor

MAX_SHARD = 5 << 30  # bytes of one file of a written model
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Stored = dict[str, tuple[Path, TensorInfo]]
Sources = dict[str, list[tuple[str, Piece | None]]]  # The stored tensors of each parameter.
Saved = dict[str, tuple[Tensor, str]]  # Tensors without storage, with their names in the files.


def write_merge(plan: Plan, session: Session, state: Any, folder: Path) -> bool:
    """Write the merged model of a plan, reading and writing one tensor after the other.

    The bytes of every tensor are those that `Composition.save` writes. This does not work for a
    route, for tied embeddings that an expert changes, for weights and tokens that only the experts
    have, and for a model that transformers saves in other tensors than its files have.

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
    sources = plan.base.names.find_sources(stored.keys() - set(plan.unused))
    saved = _list_saved(model, plan, stored, sources)
    if saved is None:
        return False
    pull(session, *(member.content for member in plan.members))
    with Contents(plan.members, session.store, gates=False) as contents:
        merged: dict[str, Callable[[], Delta]] = {}
        for unit in plan.units:
            method = unit.recipe.method.method
            with torch.no_grad(), explain_errors(method):
                vector = merge_experts(unit, contents, state)
                merged |= {name: partial(_compute_change, vector, name, method) for name in vector}
        with create_folder(folder) as draft:
            with explain_loading_errors(plan.base, list_loading_errors(), "save"):
                model.save_pretrained(draft, state_dict={})
            tensors = _MergedTensors(plan, stored, sources, merged)
            _write_weights(draft, saved, tensors, session)
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


def _list_saved(model: Any, plan: Plan, stored: Stored, sources: Sources) -> Saved | None:
    """List the tensors to write; None if they are not those of the files."""
    names, state = plan.base.names, model.state_dict()
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    twins = [names for names in shared.values() if len(names) > 1]
    if any(name in plan.parameters for names in twins for name in names):
        return None
    if not set(plan.parameters) <= sources.keys():
        return None
    dropped = {name for names in twins for name in names if name not in sources}
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    found: Saved = {}
    for name, tensor in revert_names(model, kept).items():
        source = name if name in stored else _find_whole(names.locate(name), sources)
        if source is None or stored[source][1].shape != tuple(tensor.shape):
            return None
        found[name] = tensor, source
    used = [source for _, source in found.values()]
    return found if sorted(used) == sorted(stored.keys() - set(plan.unused)) else None


def _find_whole(place: Place | None, sources: Sources) -> str | None:
    """Return the stored tensor that is a whole parameter; None if there is none."""
    parts = sources.get(place, []) if isinstance(place, str) else []
    return parts[0][0] if len(parts) == 1 and parts[0][1] is None else None


class _MergedTensors:
    """The tensors of the base's files with the changes of a merge, made one after the other.

    Args:
        plan: The plan.
        stored: The file and the declaration of each stored tensor.
        sources: The stored tensors of each parameter.
        changes: For each changed parameter, a function that computes the change.
    """

    def __init__(
        self,
        plan: Plan,
        stored: Stored,
        sources: Sources,
        changes: dict[str, Callable[[], Delta]],
    ) -> None:
        self.plan, self.stored, self.sources, self.changes = plan, stored, sources, changes
        self.names = plan.base.names
        # Merged parameters, and how many of their stored tensors are still to be made of them.
        self.merged: dict[str, tuple[Tensor, int]] = {}

    def make(self, name: str, dtype: torch.dtype) -> Tensor:
        """Make a stored tensor in a dtype."""
        place, shape = self.names.moved.get(name, name), self.stored[name][1].shape
        if isinstance(place, str):
            tensor, change = self._read(name, dtype), self.changes.get(place)
            return tensor if change is None else self._add(tensor, change, place)
        changed = [piece for piece in place if piece.parameter in self.changes]
        # Pieces that cover the tensor write all of its entries.
        whole = is_covered(changed, shape)
        tensor = torch.empty(shape, dtype=dtype) if whole else self._read(name, dtype)
        for piece in changed:
            piece.read(self._merge(piece.parameter, dtype), tensor)
        return tensor

    def _merge(self, name: str, dtype: torch.dtype) -> Tensor:
        """Join a parameter and add its change, or return it if it was made for another tensor."""
        parts, shape = self.sources[name], self.names.shapes[name]
        if name not in self.merged:
            joined = join_pieces(((self._read(n, dtype), piece) for n, piece in parts), shape)
            self.merged[name] = self._add(joined, self.changes[name], name), len(parts)
        whole, left = self.merged.pop(name)
        if left > 1:
            self.merged[name] = whole, left - 1
        return whole

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a stored tensor."""
        tensor = read_tensor(*self.stored[name])
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _add(self, tensor: Tensor, change: Callable[[], Delta], name: str) -> Tensor:
        """Add a change."""
        return add_change(tensor, change(), name, self.plan.dtype)


def _write_weights(folder: Path, saved: Saved, tensors: _MergedTensors, session: Session) -> None:
    """Write the weights into one file, or into several with an index."""
    sizes = {name: tensor.nbytes for name, (tensor, _) in saved.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(saved):
        if shards[-1] and size + sizes[name] > MAX_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    places: dict[str, str] = {}
    count, done = len(shards), 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        infos = {n: (NAMES[saved[n][0].dtype], tuple(saved[n][0].shape)) for n in names}
        layout = SafetensorsLayout(infos, {"format": "pt"})
        with create_safetensors(folder / file, layout) as writer, torch.no_grad():
            for name in sorted(names, key=lambda name: layout.places[name]):
                empty, source = saved[name]
                made = tensors.make(source, empty.dtype).contiguous()
                writer.put(name, made.reshape(-1).view(torch.uint8).numpy().data)
                done += 1
                session.report("writing the model", done, len(saved))
        places |= dict.fromkeys(names, file)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(places.items())),
        }
        write_json(folder / "model.safetensors.index.json", index)
