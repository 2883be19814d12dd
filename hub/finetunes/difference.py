"""Experts out of full fine-tunes: fine-tuned minus base, dense, sparse or as a LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base, linear_modules
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import create_folder
from experthub.hub.finetunes import lora, vector
from experthub.hub.finetunes.form import MAX_SHARD_SIZE, Form
from experthub.hub.finetunes.two_models import (
    Changed,
    StoredWeights,
    changed_of,
    pairs_of,
    weights_of,
)
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert
from experthub.hub.session import Session
from experthub.hub.transfer.describe import checkpoint_folder, describe


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
    session: Session | None = None,
) -> Difference:
    """Store fine-tuned minus base as an expert in the user's own registry.

    One tensor of each model is in memory at a time.

    Args:
        base: The base: a registry name, a folder or `hf:...`.
        finetuned: The fine-tuned model, in the same forms.
        name: The name of the expert in the user's own registry.
        rank: The rank of a LoRA, see `Form`.
        energy: The share of the squared norm that a LoRA keeps, see `Form`.
        sparse: The share of entries that are kept, see `Form`.
        dtype: The dtype of the stored tensors, see `Form`.
        max_shard_size: The largest file in bytes, see `Form`.
        task: The task that the model was trained on.
        description: One line about the expert.
        version: The version. The default is the next one of the name.
        session: The registry, the store and the progress callback. The default is `Session()`.

    Returns:
        The registered expert and its figures.

    Raises:
        HubError: The models differ in parameters or shapes, or are equal, or the form cannot hold
            the difference.
    """
    form = Form(rank, energy, sparse, dtype, max_shard_size)
    session = session or Session()
    check_name(name)
    before, after = find(base, session), find(finetuned, session)
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
        checkpoint_folder(name, {"base": before.fingerprint, **record, **form.record()}),
        session,
        record=record,
        task=task,
        description=description,
        version=version,
    )


def take_in(
    base: Base,
    tuned: StoredWeights,
    name: str,
    form: Form,
    run: Path,
    session: Session,
    *,
    record: dict[str, Any],
    task: str | None,
    description: str = "",
    version: int | None = None,
) -> Difference:
    """Write the difference to a base into a run's folder, store it and register it; see `diff`.

    Args:
        base: The base.
        tuned: The fine-tuned weights.
        name: The name of the expert.
        form: The form in which the difference is stored.
        run: The run's folder.
        session: The registry, the store and the progress callback.
        record: What the expert's training record contains besides the form and the figures.
        task: The task that the model was trained on.
        description: One line about the expert.
        version: The version. The default is the next one of the name.

    Returns:
        The registered expert and its figures.

    Raises:
        HubError: The models are equal, or the form cannot hold the difference.
    """
    report = session.report
    untouched = weights_of(base)
    pairs = pairs_of(untouched, tuned)
    changed = list(changed_of(pairs, untouched, tuned, report))
    if not changed:
        raise HubError(
            f"{tuned.name} has the weights of {base.name}: nothing has changed",
            "name the base first, then the fine-tuned model",
        )
    kinds = linear_modules(base) if form.low_rank else {}
    with create_folder(run / "expert") as folder:
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
        session,
        task=task,
        training={**record, **form.record(), **figures},
        version=version,
        description=description,
    )
    return Difference(expert, figures, tuple(error.left_out))


def dense_bytes(changed: Iterable[Changed]) -> int:
    """What the changed parameters need as they are, in float32."""
    return sum(4 * change.count for change in changed)
