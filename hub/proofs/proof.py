"""The proof that the hub composes an expert to what its source library computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.bases.vocabulary import resize_model
from experthub.hub.composition.compose import compose
from experthub.hub.errors import LIBRARY_ERRORS, HubError, IntegrityError
from experthub.hub.kinds import kinds
from experthub.hub.kinds.prompt import SOFT_PROMPT
from experthub.hub.proofs.inputs import compare_outputs, compute_outputs, make_inputs
from experthub.hub.proofs.local_base import (
    CannotProveError,
    check_base_is_local,
    name_peft,
    report_missing,
)
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import Expert
from experthub.hub.registry.proof_record import Proof
from experthub.hub.session import Session
from experthub.hub.transfer.remotes.no_network import forbid_network
from experthub.merge import concatenate, linear
from torch import Tensor

Outputs = dict[str, Tensor]
DTYPE = "float32"
ADAPTER_NAME = "default"  # The name that peft gives to an adapter.
TOLERANCE = 1e-4  # The largest difference, as a share of the largest output; at least of 1.
LARGEST_BASE = 2 << 30  # Bytes of a base in float32, above which a proof is made on request only.


@dataclass(frozen=True)
class SourceLibrary:
    """Another library, which loads an expert onto a base.

    Args:
        against: The name and version of the library.
        load: A function of the base's model in float32 that returns the model with the expert. It
            may change the base's model.
        merge: A function of the loaded model that adds the expert to the weights. It is tried where
            the outputs differ: an adapter beside a module has no effect if the model reads the
            module's weight without a call.
    """

    against: str
    load: Callable[[Any], Any]
    merge: Callable[[Any], Any] | None = None


def load_with_peft(folder: Path) -> SourceLibrary:
    """Return peft as the reference for an adapter in its format.

    Args:
        folder: The folder that peft wrote.

    Returns:
        The reference.
    """

    def load(model: Any) -> Any:
        from peft import PeftModel

        # The network is forbidden, and peft runs no code of a folder.
        made = PeftModel.from_pretrained(model, folder, local_files_only=True)
        # Only a second time it says which tensors have found no place.
        found = made.load_adapter(folder, ADAPTER_NAME, local_files_only=True)
        _refuse_incomplete(name, found.unexpected_keys)
        return made

    name = name_peft()
    return SourceLibrary(name, load, lambda model: model.merge_and_unload())


def _refuse_incomplete(name: str, left_out: Sequence[str]) -> None:
    """Refuse to compare with a library that leaves tensors of an adapter out."""
    # peft needs no copies of the base's weights, nor of modules that it has saved by their names.
    # It loads soft prompts apart from other tensors.
    placed = (".base_layer.", ".modules_to_save.", "prompt_embeddings")
    left_out = [key for key in left_out if not any(part in key for part in placed)]
    if left_out:
        count = "1 tensor" if len(left_out) == 1 else f"{len(left_out)} tensors"
        raise CannotProveError(
            f"{name} leaves {count} of the adapter out (first: {left_out[0]})",
            "pass --no-proof, and check the expert with hub eval",
        )


def prove(
    expert: Expert, reference: SourceLibrary, session: Session, *, requested: bool = False
) -> Proof | None:
    """Compare a stored expert, composed alone, with what another library computes.

    Both run on a fixed random input in float32. Nothing is downloaded.

    Args:
        expert: The entry of the expert, whose content is in the store.
        reference: The other library.
        session: The registry, the store and the progress callback.
        requested: Whether the user asked for the proof. Otherwise a proof that cannot be made is a
            note, and a large base is left out.

    Returns:
        The proof; None if it cannot be made.

    Raises:
        IntegrityError: The outputs differ.
        HubError: The proof was requested and cannot be made, or the expert does not fit its base.
    """
    try:
        plan = _plan_alone(expert, _find_local_base(expert, session, requested), session)
        session.report(f"comparing with {reference.against}", 0, 0)
        with torch.random.fork_rng(devices=[]), forbid_network(), _explain_errors(reference):
            against, difference, largest = _run_both(plan, reference, session)
    except CannotProveError as error:
        if requested:
            raise
        report_missing(reference.against, error, session)
        return None
    return _judge(expert, against, difference, largest)


def _run_both(plan: Plan, reference: SourceLibrary, session: Session) -> tuple[str, float, float]:
    """Compare the outputs of the composition and of the reference, one model after the other.

    Both have the tokens of the base in the same rows; other rows are left out.

    Returns:
        What the composition was compared with, the largest difference and the largest output.
    """
    model = compose(plan, session=session).model
    rows, seen = _count_tokens(plan)
    inputs = make_inputs(model, seen)
    ours = compute_outputs(model, inputs)
    del model
    other = load_model(plan.base, DTYPE, session.device)
    if rows:
        resize_model(other, rows)
    other = reference.load(other)
    theirs = compute_outputs(other, inputs)
    theirs = {n: _cut_virtual(value, ours.get(n), plan) for n, value in theirs.items()}
    found = _compare(ours, theirs, seen)
    if reference.merge is not None and not _is_equal(*found):
        try:
            merged = _compare(ours, compute_outputs(reference.merge(other), inputs), seen)
        except LIBRARY_ERRORS:  # Not every adapter can be merged.
            return reference.against, *found
        if _is_equal(*merged):
            return f"{reference.against} (merged)", *merged
    return reference.against, *found


def _compare(ours: Outputs, theirs: Outputs, seen: int) -> tuple[float, float]:
    """Compare outputs; of logits only the first `seen` words, if it is not 0."""
    cut = {name for name in ours.keys() & theirs.keys() if seen and "logits" in name}
    one, other = (
        {n: value[..., :seen] if n in cut else value for n, value in outputs.items()}
        for outputs in (ours, theirs)
    )
    return compare_outputs(one, other)


def _is_equal(difference: float, largest: float) -> bool:
    """Tell whether a difference is within the tolerance."""
    return difference <= TOLERANCE * max(1.0, largest)


def _cut_virtual(theirs: Tensor, ours: Tensor | None, plan: Plan) -> Tensor:
    """Cut the virtual tokens off the outputs of another library, which has outputs for them, too."""
    count = plan.virtual_tokens
    if ours is None or not count or theirs.ndim != ours.ndim or theirs.ndim < 2:
        return theirs
    return theirs[:, count:] if theirs.shape[1] == ours.shape[1] + count else theirs


def _count_tokens(plan: Plan) -> tuple[int, int]:
    """Count the rows of the expert's embeddings, and the first of them that are rows of both models.

    Both are 0 for an expert with the vocabulary of its base.
    """
    if plan.vocabulary is None:
        return 0, 0
    (member,) = plan.members
    rows = max(member.footprint.rows.values(), default=plan.vocabulary.own)
    places = plan.vocabulary.sources[member.digest]
    moved = [row for row, source in places.items() if row != source]
    moved += [source for row, source in places.items() if row != source and source >= 0]
    return rows, min([rows, plan.vocabulary.rows, *moved])


def _find_local_base(expert: Expert, session: Session, requested: bool) -> Base:
    """Find the base of an expert without a download; refuse a large one unless it is requested."""
    name = expert.base
    check_base_is_local(name, session.registry)
    with forbid_network():
        base = find(name, session)
    size = 4 * sum(map(math.prod, base.shapes.values()))
    if size > LARGEST_BASE and not requested:
        raise CannotProveError(
            f"the base {name} needs {size / 2**30:.0f} GiB in float32; pass --proof to compare",
            "pass --proof",
        )
    return base


def _plan_alone(expert: Expert, base: Base, session: Session) -> Plan:
    """Plan the expert alone on its base."""
    is_prompt = kinds[expert.kind] is SOFT_PROMPT
    recipe = Recipe.of(
        {
            "base": base.name,
            "experts": [expert.name],
            "merge": {"method": (concatenate if is_prompt else linear).__name__},
            "dtype": DTYPE,
        }
    )
    try:
        return resolve(recipe, session=session, pinned=[Content.from_expert(expert)])
    except HubError as error:
        error.hint = f"{error.hint}; pass --no-proof to register it nevertheless"
        raise


@contextmanager
def _explain_errors(reference: SourceLibrary) -> Iterator[None]:
    """Hide the warnings of a library, and turn its errors into CannotProveError."""
    try:
        with warnings.catch_warnings():  # They are about training and saving.
            warnings.simplefilter("ignore")
            yield
    except LIBRARY_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CannotProveError(
            f"{reference.against} cannot run it: {reason}", "pass --no-proof"
        ) from None


def _judge(expert: Expert, against: str, difference: float, largest: float) -> Proof:
    """Refuse an expert whose outputs differ from those of the other library."""
    if not _is_equal(difference, largest):
        raise IntegrityError(
            f"{expert.name}: its outputs differ by {difference:.3g} from those of "
            f"{against}, and the largest output is {largest:.3g}",
            "check that the folder is complete and unchanged, or pass --no-proof to register it "
            "nevertheless",
        )
    return Proof(against=against, max_difference=difference, dtype=DTYPE)
