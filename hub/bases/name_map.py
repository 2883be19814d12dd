"""The map from stored names to parameters, read off transformers' own conversion of weights.

Transformers says which stored tensors become which parameter, by rules for names and by operations on
tensors (`conversion_mapping`). The operations only move entries. So they are run on small tensors of
labels, one for each axis, and the labels show where every row and column ends up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.building import (
    StoredModel,
    build_empty,
    list_loading_errors,
)
from experthub.hub.bases.names import ModelNames, Piece, Place, Run, Shape
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.digests import digest_of
from experthub.hub.files.json_files import read_json
from experthub.merge import find_weight_reads, is_linear, is_transposed
from torch import Tensor

CACHE_VERSION = 2
_known: dict[str, ModelNames] = {}  # By the key of the cache.
_built: dict[str, Any] = {}  # The last model that was built without storage, by the key.


def read_names(base: StoredModel) -> ModelNames:
    """Read the names of a base's parameters.

    The answer is cached for the base's digest and the version of transformers, whose code decides.

    Args:
        base: The base.

    Returns:
        The names.

    Raises:
        HubError: Transformers cannot build the model, or a shape differs.
    """
    key = digest_of([CACHE_VERSION, base.digest, version("transformers")])[7:23]
    if key not in _known:
        cache, find_renamed = (
            hub_home() / "fingerprints" / f"names-{key}.json",
            partial(_rename, base, key),
        )
        found = _read_cache(cache)
        if found is None:
            found = _make_names(base, key, find_renamed).record()
            write_json(cache, {"names": found, "check": digest_of(found)})
        _known[key] = ModelNames.parse(found, find_renamed)
    return _known[key]


def _read_cache(cache: Path) -> dict[str, Any] | None:
    """Return the cached names; None if there are none or the file is damaged."""
    try:
        record: dict[str, Any] = read_json(cache) if cache.is_file() else {}
    except HubError:
        return None
    found = record.get("names")
    intact = isinstance(found, dict) and record.get("check") == digest_of(found)
    return found if intact else None


def _build(base: StoredModel, key: str) -> tuple[Any, list[str], list[str]]:
    """Build the model of a base without storage, or return the one that was built last."""
    if key not in _built:
        _built.clear()
        _built[key] = build_empty(base)
    found: tuple[Any, list[str], list[str]] = _built[key]
    return found


def _make_names(base: StoredModel, key: str, find_renamed: Any) -> ModelNames:
    """Build the model without storage, and read its names and those of its files."""
    model, missing, unused = _build(base, key)
    state = model.state_dict()
    shapes: dict[str, Shape] = {
        name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
    }
    modules = dict(model.named_modules())
    moved = _place_tensors(model, state, base.stored)
    older = {name: shape for name, shape in _list_older(model, state).items() if name not in shapes}
    aliases = _place_tensors(model, state, {n: s for n, s in older.items() if n not in base.stored})
    return ModelNames(
        shapes=shapes,
        tied=_find_tied(model, base, shapes),
        linear={
            name: is_transposed(module) for name, module in modules.items() if is_linear(module)
        },
        main_input=model.main_input_name,
        transposed=frozenset(n for n, m in modules.items() if getattr(m, "is_transposed", False)),
        moved={name: place for name, place in moved.items() if place != name},
        aliases=aliases,
        missing=tuple(missing),
        unused=tuple(unused),
        uncalled=frozenset(n for n, read in find_weight_reads(model).items() if read.is_lost),
        find_renamed=find_renamed,
    )


def _find_tied(model: Any, base: StoredModel, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return the output embedding with its source, if the model ties it and no file has it."""
    output = model.get_output_embeddings()
    pairs = model.all_tied_weights_keys.items()
    return {
        use: source
        for use, source in pairs
        if use not in base.stored
        and {use, source} <= shapes.keys()
        and output is model.get_submodule(use.rpartition(".")[0])
    }


def _list_older(model: Any, state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """List the tensors that transformers would write for a model, with the names of older versions."""
    own = getattr(model, "_weight_conversions", None)
    try:
        model._weight_conversions = None  # The rules of the architecture, not those of the files.
        written = revert_names(model, state)
    except list_loading_errors():
        return {}
    finally:
        model._weight_conversions = own
    return {name: tuple(tensor.shape) for name, tensor in written.items()}


def revert_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, divide and join parameters as transformers does when it saves a model.

    Args:
        model: The model.
        state: Its parameters, which may be without storage.

    Returns:
        The tensors of the files.
    """
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return reverted


class _Rules:
    """Transformers' rules for the names of one model."""

    def __init__(self, model: Any) -> None:
        from transformers import conversion_mapping, core_model_loading

        self.loading = core_model_loading
        rules = conversion_mapping.get_model_conversion_mapping(model)
        self.renamings = [r for r in rules if isinstance(r, core_model_loading.WeightRenaming)]
        self.converters = [r for r in rules if isinstance(r, core_model_loading.WeightConverter)]
        self.prefix: str = model.base_model_prefix

    def convert(self, name: str, state: Mapping[str, Any]) -> tuple[str, str | None]:
        """Return the parameter that a tensor goes to, and the pattern of its conversion."""
        convert = self.loading.rename_source_key
        found = convert(name, self.renamings, self.converters, self.prefix, state)
        if found[0] not in state and name in state:
            # Transformers, too, tries it without the rules.
            found = convert(name, [], [], self.prefix, state)
        place: tuple[str, str | None] = found
        return place

    def list_variants(self, name: str) -> list[str]:
        """Return the name after the renamings, with and without the prefix of the base model."""
        renamed, prefix = self.loading.apply_renamings(name, self.renamings), f"{self.prefix}."
        both = [renamed, name]
        return [*both, *(prefix + n for n in both), *(n.removeprefix(prefix) for n in both)]


def _rename(base: StoredModel, key: str, name: str) -> list[str]:
    """Apply transformers' rules to a name that no file of the base has."""
    model = _build(base, key)[0]
    rules, state = _Rules(model), model.state_dict()
    renamed, pattern = rules.convert(name, state)
    return rules.list_variants(name) if pattern else [renamed]


def _place_tensors(
    model: Any, state: Mapping[str, Tensor], tensors: Mapping[str, Shape]
) -> dict[str, Place]:
    """Find the place of every tensor that transformers would load from a file with these tensors."""
    rules = _Rules(model)
    found: dict[str, Place] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(tensors, key=rules.loading.dot_natural_key):
        renamed, pattern = rules.convert(name, state)
        if renamed not in state:
            continue
        if pattern is None:
            found[name] = renamed
        else:
            groups.setdefault(renamed, []).append((name, pattern))
    converters = {p: rule for rule in rules.converters for p in rule.source_patterns}
    for target, members in groups.items():
        rule = converters[members[0][1]]
        placed = _place_group(model, state, target, members, rule, tensors)
        found |= {name: place for name, place in placed.items() if place}
    return found


def _place_group(
    model: Any,
    state: Mapping[str, Tensor],
    target: str,
    members: Sequence[tuple[str, str]],
    rule: Any,
    tensors: Mapping[str, Shape],
) -> dict[str, tuple[Piece, ...]]:
    """Find the places of the tensors that one conversion takes together."""
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name, _ in members}
    ranks = {len(tensors[name]) for name, _ in members}
    if len(ranks) != 1:
        return {}
    for axis in range(ranks.pop()):
        conversion, start, spans = deepcopy(rule), 1, {}
        for name, pattern in members:
            length = tensors[name][axis]
            shape = [length if i == axis else 1 for i in range(len(tensors[name]))]
            labels = torch.arange(start, start + length).view(shape)
            spans[name] = start, start + length
            conversion.add_tensor(target, name, pattern, labels)
            start += length
        try:
            made = conversion.convert(target, model=model, config=model.config)
        except list_loading_errors():
            return {}
        for parameter, one in made.items():
            labelled = one[0] if isinstance(one, list) else one
            for name, (begin, end) in spans.items():
                here = ((labelled >= begin) & (labelled < end)).nonzero()
                if len(here):
                    source = labelled[tuple(here.T)] - begin
                    found[name].setdefault(parameter, []).append(
                        torch.cat([source[:, None], here], 1)
                    )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {
        name: tuple(
            piece
            for parameter, rows in places.items()
            if parameter in shapes
            and (piece := _make_piece(parameter, tensors[name], rows, len(shapes[parameter])))
        )
        for name, places in found.items()
    }


def _make_piece(parameter: str, shape: Shape, rows: list[Tensor], ndim: int) -> Piece | None:
    """Make a piece from the rows (source index, coordinates) that the labels of each axis gave."""
    if len(rows) != len(shape):
        return None
    axes: list[tuple[int, tuple[Run, ...]] | None] = []
    for own in rows:
        moving = [
            i for i in range(ndim) if len(own) > 1 and len(set(own[:, 1 + i].tolist())) == len(own)
        ]
        if len(own) > 1 and len(moving) != 1:
            return None
        axes.append((moving[0], _find_runs(own[:, [0, 1 + moving[0]]])) if moving else None)
    taken = [axis[0] for axis in axes if axis is not None]
    if len(set(taken)) != len(taken):
        return None
    fixed = [(i, int(rows[0][0, 1 + i])) for i in range(ndim) if i not in taken]
    return Piece(parameter, shape, tuple(fixed), tuple(axes))


def _find_runs(pairs: Tensor) -> tuple[Run, ...]:
    """Join pairs (source, target) into runs of consecutive positions."""
    runs: list[list[int]] = []
    for source, target in sorted(pairs.tolist(), key=lambda pair: pair[1]):
        last = runs[-1] if runs else None
        if last and last[0] + last[2] == source and last[1] + last[2] == target:
            last[2] += 1
        else:
            runs.append([source, target, 1])
    return tuple((s, t, n) for s, t, n in runs)
