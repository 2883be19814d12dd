"""The materials from which a merge prepares its state: task vectors, data, an optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from experthub.hub.bases.loading import load_model
from experthub.hub.bases.tying import untie
from experthub.hub.composition.assembly import complete_base
from experthub.hub.composition.weights import Contents, load_task_vector
from experthub.hub.errors import ConflictError, UsageError
from experthub.hub.materials.cma_es import minimize
from experthub.hub.materials.task_data import TaskData
from experthub.hub.progress import Report
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.recipes.examples import choose_examples, hold_out
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.states.run_state import load_progress, save_progress
from experthub.merge import MergeMaterials


@contextmanager
def open_merge_materials(plan: Plan, session: Session) -> Iterator[MergeMaterials]:
    """Offer the experts and the data of a plan, for as long as the block lasts.

    Args:
        plan: A plan with one merge.
        session: The store, the device and the progress callback.

    Yields:
        The materials. Tensors of experts are read when a parameter is asked for.

    Raises:
        UsageError: The merge needs data, and the recipe has none.
        ConflictError: A task differs from the one that the lock pins.
    """
    with Contents(plan.members, session.store, gates=False) as contents:
        yield MergeMaterials(
            vectors=[load_task_vector(expert, plan, contents) for expert in plan.experts],
            weights=torch.tensor([expert.weight for expert in plan.experts]),
            data=_read_data(plan, session.device, contents, session.report),
            minimize=minimize,
            load=lambda: load_progress(plan),
            save=lambda progress: save_progress(plan, progress),
            report=session.report,
        )


def _read_data(
    plan: Plan, device: str | None, contents: Contents, report: Report
) -> TaskData | None:
    """Read the data of a recipe, with the base that reads it; None if the merge needs none."""
    method = plan.recipe.method
    if not method.strategy.needs_data:
        return None
    if plan.data is None:
        raise UsageError(f"{method.method} needs data", "set data: in the recipe")
    use, given = plan.data.use, choose_examples(plan.data.use)
    for one, digest in zip(given, plan.data.digests, strict=True):
        if one.task.digest != digest:
            raise ConflictError(
                f"task {one.task.reference} is {one.task.digest[:19]} here, "
                f"and the lock pins {digest[:19]}",
                "import the task that was pinned, or write the lock again with hub lock",
            )
    labelled = method.strategy.needs_labels(method.options)
    # The base is loaded in float32 for every dtype of the composition, because gradients in half
    # precision lose too much.
    model = load_model(plan.base, "float32", device)
    complete_base(model, plan, contents)
    untie(model, plan.parameters, plan.adapted)
    # The rows are made first, because the reader computes parts of them with the unchanged model.
    reader = reader_for(plan.base, device, lambda: model, report=report)
    others = hold_out(use, given) if labelled else None
    looked_at = TaskData(model, reader, others, True) if others else None
    return TaskData(model, reader, given, labelled, looked_at)
