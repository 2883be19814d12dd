"""Experts out of full fine-tunes: fine-tuned minus base, dense, sparse or as a LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base, linear_modules
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import new_folder
from experthub.hub.finetunes import lora, vector
from experthub.hub.finetunes.form import MAX_SHARD_SIZE, Form
from experthub.hub.finetunes.two_models import Changed, Weights, changed_of, pairs_of, weights_of
from experthub.hub.progress import Report, silent
from experthub.hub.registry.expert import Expert
from experthub.hub.registry.registry import Registry, checked_name
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import describe, run_folder


@dataclass(frozen=True)
class Difference:
    """A registered difference: the expert, its figures, and the parameters it has no place for."""

    expert: Expert
    figures: dict[str, Any]
    left_out: tuple[str, ...]


def diff(
    base: str,
    finetuned: str,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sparse: float | None = None,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    task: str | None = None,
    description: str = "",
    version: int | None = None,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
) -> Difference:
    """Store fine-tuned minus base as an expert in the user's own registry.

    base, finetuned: registry names, folders, `hf:...`.  rank, energy, sparse, dtype,
    max_shard_size: see `Form`.
    One tensor of each model is in memory at a time.  Raises HubError for models of different
    parameters or shapes, for equal ones, and for a form that cannot hold the difference.
    """
    form = Form(rank, energy, sparse, dtype, max_shard_size)
    registry = registry or Registry.read()
    checked_name(name)
    before, after = find(base, registry, report), find(finetuned, registry, report)
    record = {
        "method": "diff",
        "finetuned": after.folder.resolve().name if after.name == str(after.folder) else after.name,
        "finetuned_fingerprint": after.fingerprint,
    }
    return take_in(
        before,
        weights_of(after),
        name,
        form,
        run_folder(name, {"base": before.fingerprint, **record, **form.record()}),
        record=record,
        task=task,
        description=description,
        version=version,
        registry=registry,
        store=store or Store(),
        report=report,
    )


def take_in(
    base: Base,
    tuned: Weights,
    name: str,
    form: Form,
    run: Path,
    *,
    record: dict[str, Any],
    task: str | None,
    registry: Registry,
    store: Store,
    report: Report,
    description: str = "",
    version: int | None = None,
) -> Difference:
    """Write the difference to a base into a run's folder, store and register it; see `diff`.

    record: what its training is to say besides the figures.
    """
    untouched = weights_of(base)
    pairs = pairs_of(untouched, tuned)
    changed = list(changed_of(pairs, untouched, tuned, report))
    if not changed:
        raise HubError(
            f"{tuned.name} has the weights of {base.name}: nothing has changed",
            "name the base first, then the fine-tuned model",
        )
    kinds = linear_modules(base) if form.low_rank else {}
    with new_folder(run / "expert") as folder:
        if form.low_rank:
            error, more = lora.write(folder, base, untouched, tuned, changed, kinds, form, report)
        else:
            error = vector.write(folder, base, untouched, tuned, changed, form, report)
            more = {}
        figures = {
            **error.record(),
            **more,
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "dense_bytes": dense_bytes(changed),
            "changed": len(changed),
            "unchanged": len(pairs) - len(changed),
        }
    expert = describe(
        run / "expert",
        name,
        base,
        registry,
        store,
        task=task,
        training={**record, **form.record(), **figures},
        version=version,
        description=description,
    )
    return Difference(expert, figures, tuple(error.left_out))


def dense_bytes(changed: Iterable[Changed]) -> int:
    """What the changed parameters need as they are, in float32."""
    return sum(4 * change.count for change in changed)
