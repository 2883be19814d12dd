"""Store the difference between a fine-tuned model and its base as an expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.vocabulary import find_vocabulary
from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.atomic import create_folder
from experthub.hub.finetunes.form import MAX_SHARD_SIZE, Form
from experthub.hub.finetunes.lora import write_lora
from experthub.hub.finetunes.two_models import (
    ChangedParameter,
    StoredWeights,
    find_changed,
    open_weights,
    pair_parameters,
)
from experthub.hub.finetunes.vector import write_task_vector
from experthub.hub.formats.added_tokens import (
    EXPERT_TOKENIZER,
    NewToken,
    read_added_tokens,
    write_added_tokens,
)
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert
from experthub.hub.session import Session
from experthub.hub.transfer.describe import create_checkpoint_folder, describe


@dataclass(frozen=True)
class Difference:
    """A stored and registered difference.

    Args:
        expert: The expert.
        figures: The errors, sizes and counts that `hub diff --json` prints.
        left_out: The parameters that changed and that the form cannot hold.
    """

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
    """Subtract a base from a fine-tuned model, and store the difference as an expert.

    Without `rank`, `energy` and `sparse`, the difference is a dense task vector. One tensor of each
    model is in memory at a time.

    Args:
        base: The base: a registry name, a folder or `hf:...`.
        finetuned: The fine-tuned model, in the same forms.
        name: The name of the expert in the user's own registry.
        rank: Store a LoRA of this rank, at least 1.
        energy: Store a LoRA. Each module gets the smallest rank that keeps this share, above 0 and
            at most 1, of the sum of its squared singular values.
        sparse: Store a sparse task vector that keeps this share, above 0 and at most 1, of each
            tensor's entries: those of the largest magnitude.
        dtype: The dtype of the stored tensors: `float32`, `bfloat16` or `float16`.
        max_shard_size: The largest number of bytes of tensors in one file of a task vector. A
            larger tensor has a file of its own.
        task: The task that the model was trained on.
        description: One line about the expert.
        version: The version. The default is the next one of the name.
        session: The registry, the store and the progress callback. The default is `Session()`.

    Returns:
        The registered expert and its figures.

    Raises:
        UsageError: An option is out of its range, or two forms are requested at once.
        HubError: The models differ in parameters or shapes, or are equal, or the form cannot hold
            the difference.

    Example:
        >>> from experthub import hub
        >>> hub.diff("./base", "./tuned", "mine", rank=16).expert.kind  # doctest: +SKIP
        'lora'
    """
    form = Form(rank, energy, sparse, dtype, max_shard_size)
    session = session or Session()
    check_name(name)
    before, after = find(base, session), find(finetuned, session)
    record = {
        "method": "diff",
        "finetuned": after.portable_name,
        "finetuned_fingerprint": after.fingerprint,
    }
    return store_difference(
        before,
        open_weights(after),
        name,
        form,
        create_checkpoint_folder(name, {"base": before.fingerprint, **record, **form.record()}),
        session,
        record=record,
        task=task,
        description=description,
        version=version,
        tokens=_read_tokens(after),
    )


def _read_tokens(tuned: Base) -> tuple[NewToken, ...]:
    """Read the added tokens of a fine-tuned model's tokenizer."""
    files = {name: tuned.folder / name for name in EXPERT_TOKENIZER}
    return read_added_tokens({n: f for n, f in files.items() if f.is_file()}, tuned.name)


def store_difference(
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
    tokens: Sequence[NewToken] = (),
) -> Difference:
    """Write the difference to a base into a run's folder, store it and register it.

    Args:
        base: The base.
        tuned: The fine-tuned weights.
        name: The name of the expert.
        form: The form in which the difference is stored.
        run: The run's folder.
        session: The registry, the store and the progress callback.
        record: The entries of the expert's training record, without the form and the figures.
        task: The task that the model was trained on.
        description: One line about the expert.
        version: The version. The default is the next one of the name.
        tokens: The added tokens of the fine-tuned model's tokenizer. They are stored if the model has
            another number of tokens than the base.

    Returns:
        The registered expert and its figures.

    Raises:
        HubError: The models are equal, or the form cannot hold the difference.
        UsageError: The form cannot hold the new tokens.
    """
    report = session.report
    untouched = open_weights(base)
    pairs = pair_parameters(untouched, tuned, lambda: find_vocabulary(base))
    resized = [p.name for p in pairs if untouched.shapes[p.base] != tuned.shapes[p.tuned]]
    if resized and (form.low_rank or form.sparse is not None):
        raise UsageError(
            f"{resized[0]} has another number of tokens in {tuned.name}, which only a dense task "
            "vector can hold",
            "remove --rank, --energy and --sparse",
        )
    changed = list(find_changed(pairs, untouched, tuned, report))
    if not changed:
        raise HubError(
            f"{tuned.name} has the same weights as {base.name}: nothing has changed",
            "name the base first, then the fine-tuned model",
        )
    transposed = base.names.linear
    with create_folder(run / "expert") as folder:
        if form.low_rank:
            error, more = write_lora(
                folder, base, untouched, tuned, changed, transposed, form, report
            )
        else:
            error = write_task_vector(folder, base, untouched, tuned, changed, form, report)
            more = {}
        if resized:
            write_added_tokens(folder, tokens)
        figures = {
            **error.record(),
            **more,
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "dense_bytes": count_dense_bytes(changed),
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


def count_dense_bytes(changed: Iterable[ChangedParameter]) -> int:
    """Count the bytes that the changed parameters need as dense float32 tensors.

    Args:
        changed: The changed parameters.

    Returns:
        The number of bytes.
    """
    return sum(4 * change.count for change in changed)
