"""What a learned merge is handed, and where what it finds is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.base import load_model
from experthub.hub.bases.tying import untie
from experthub.hub.errors import ConflictError, HubError, IntegrityError, UsageError
from experthub.hub.files.atomic import hub_home, new_folder, write_json, written
from experthub.hub.formats.coefficients import (
    TENSOR,
    CoefficientExpert,
    CoefficientsRecord,
    read_coefficients,
)
from experthub.hub.materials.router_state import kept_router
from experthub.hub.materials.task_data import TaskData
from experthub.hub.progress import Report, silent
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.recipes.examples import chosen, held_out
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.expert import COEFFICIENTS, COEFFICIENTS_JSON, Expert
from experthub.hub.registry.registry import Registry
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import write_description
from experthub.hub.transfer.pull import Content
from experthub.merge import Coefficients, Learner, TaskVector
from torch import Tensor

STATE = "state.safetensors"
SHAPING = ("granularity", "groups", "plus_plus", "density", "combine")


def run_folder(plan: Plan) -> Path:
    """Where the state of a run and what it found are kept: one place for one composition."""
    return hub_home() / "runs" / f"coefficients-{plan.digest[7:23]}"


def found_folder(plan: Plan) -> Path:
    """The folder of coefficients that a plan has found, whether it is there or not."""
    return run_folder(plan) / "found"


def learner_for(plan: Plan, device: str | None, store: Store, report: Report) -> Learner:
    """Stored coefficients where the plan has some or has found some before; else data to learn from."""
    if plan.found is not None:
        record, found = stored_coefficients(plan.found, store)
        _check_fit(record, plan, plan.found.reference)
        return Learner(stored=found)
    folder = found_folder(plan)
    if plan.learns and folder.is_dir():
        record, found = _read(folder / COEFFICIENTS_JSON, folder / COEFFICIENTS)
        _check_fit(record, plan, str(folder))
        return Learner(stored=found)
    state = run_folder(plan) / STATE
    return Learner(
        data=_data(plan, device),
        minimise=cma_es,
        load=lambda: _loaded(state),
        save=lambda found: _save(state, found),
        report=report,
    )


def _data(plan: Plan, device: str | None) -> TaskData:
    if plan.data is None:
        raise UsageError(f"{plan.recipe.method.method} needs data", "say data: in the recipe")
    use, given = plan.data.use, chosen(plan.data.use)
    for one, digest in zip(given, plan.data.digests, strict=True):
        if one.task.digest != digest:
            raise ConflictError(
                f"task {one.task.reference} is {one.task.digest[:19]} here, and {digest[:19]} is pinned",
                "import the task again as it was, or lock the recipe anew",
            )
    method = plan.recipe.method
    labelled = method.strategy.labelled(method.options)
    # In single precision whatever the composition's: gradients of half precision lose too much.
    model = load_model(plan.base, "float32", device)
    untie(model, plan.parameters, plan)
    # Rows, and what they have of the base, are made before anything changes the model.
    reader = reader_for(plan.base, device, lambda: model)
    others = held_out(use, given) if labelled else None
    looked_at = TaskData(model, reader, others, True) if others else None
    return TaskData(model, reader, given, labelled, looked_at)


def keep(plan: Plan, found: Coefficients) -> Path:
    """Write what a plan has found into its folder, once; returns the folder."""
    folder = found_folder(plan)
    if not folder.is_dir():
        with new_folder(folder) as draft:
            _write_coefficients(draft, plan, found)
            identity = read_folder(draft).model_copy(
                update={"base_fingerprint": plan.base.fingerprint}
            )
            described = Expert(
                name=plan.recipe.method.method,
                kind="coefficients",
                base=plan.base.name,
                digest=identity.digest,
                sources=[f"file:{folder}"],
                training={"data": plan.data.record()} if plan.data else {},
            )
            write_description(draft, described, identity)
        (run_folder(plan) / STATE).unlink(missing_ok=True)
    return folder


def learned(
    plan: Plan,
    *,
    device: str | None = None,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
) -> Content:
    """What the method of a plan finds, now unless it has before, as content of the store.

    The coefficients of a merge, or the state of a router.
    """
    from experthub.hub.composition.weights import Contents, task_vector

    store = store or Store()
    if plan.recipe.route is not None:
        return kept_router(plan, device, registry, store, report)
    folder = found_folder(plan)
    if not folder.is_dir():
        with Contents(plan.members, store, gates=False) as contents:
            vectors = [task_vector(expert, plan, contents) for expert in plan.experts]
            merge(plan, vectors, device, store, report)
    digest, _ = store.add(folder)
    return Content(f"file:{folder}", digest, (f"file:{folder}",), None)


def merge(
    plan: Plan, vectors: list[TaskVector], device: str | None, store: Store, report: Report
) -> TaskVector:
    """The task vector that a recipe's merge makes of its experts; what it learns is kept."""
    method = plan.recipe.method
    weights = torch.tensor([expert.weight for expert in plan.experts])
    if not plan.recipe.learned:
        simple: TaskVector = method.strategy.call(vectors, weights, **method.options)
        return simple
    learner = learner_for(plan, device, store, report)
    with torch.enable_grad():
        merged: TaskVector = method.strategy.call(vectors, weights, learner, **method.options)
    if learner.stored is None and merged.coefficients is not None:
        keep(plan, merged.coefficients)
    return merged


def _write_coefficients(folder: Path, plan: Plan, found: Coefficients) -> None:
    """Write coefficients.json and coefficients.safetensors."""
    from safetensors.torch import save

    options = plan.recipe.method.options
    record = CoefficientsRecord(
        method=plan.recipe.method.method,
        options=options,
        granularity=found.granularity,
        combine=found.combine,
        experts=[CoefficientExpert(expert=e.label, digest=e.digest) for e in plan.experts],
        blocks=list(found.blocks),
        objective=options.get("setting") or options.get("objective"),
        data=plan.data.digest if plan.data else None,
        seed=found.seed,
        history=list(found.history),
    )
    with written(folder / COEFFICIENTS) as file:
        file.write(save({TENSOR: found.values.contiguous()}))
    write_json(folder / COEFFICIENTS_JSON, record.model_dump(mode="json", by_alias=True))


def stored_coefficients(content: Content, store: Store) -> tuple[CoefficientsRecord, Coefficients]:
    """What the store has of some, and the numbers."""
    files = [store.file(content.digest, name) for name in (COEFFICIENTS_JSON, COEFFICIENTS)]
    return _read(files[0], files[1])


def _read(record: Path, tensors: Path) -> tuple[CoefficientsRecord, Coefficients]:
    """Coefficients from files: what they are of, and the numbers."""
    from safetensors.torch import load

    found = read_coefficients(record, tensors)
    return found, Coefficients(
        load(tensors.read_bytes())[TENSOR].double(),
        tuple(found.blocks),
        found.granularity,
        found.combine,
        found.seed,
        tuple(found.history),
    )


def _check_fit(found: CoefficientsRecord, plan: Plan, name: str) -> None:
    """Refuse coefficients of another method, of other options that shape them, or of other experts."""
    method = plan.recipe.method
    if found.method != method.method:
        raise UsageError(
            f"{name} was found by {found.method}, and the recipe says {method.method}",
            f"say method: {found.method}",
        )
    for option in SHAPING:
        there, here = found.options.get(option), method.options.get(option)
        if there != here:
            raise UsageError(
                f"{name} was found with {option} {there}, and the recipe says {here}",
                f"say {option}: {there}",
            )
    wanted, present = [e.digest for e in found.experts], [e.digest for e in plan.experts]
    if wanted != present:
        raise UsageError(
            f"{name} has coefficients of {', '.join(e.expert for e in found.experts)}, "
            f"and the recipe has {', '.join(e.label for e in plan.experts)}",
            "name the same experts in the same order, or learn anew from data:",
        )


def _loaded(state: Path) -> dict[str, Tensor] | None:
    """The state of an interrupted run, if there is one; IntegrityError when it cannot be read."""
    from safetensors.torch import load

    if not state.is_file():
        return None
    try:
        found: dict[str, Tensor] = load(state.read_bytes())
        return found
    except (OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{state} is damaged: {error}", "remove it to begin again") from None


def _save(state: Path, found: Any) -> None:
    from safetensors.torch import save

    with written(state) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in found.items()}))


def cma_es(
    loss: Callable[[Sequence[float]], float],
    start: Sequence[float],
    bound: float,
    evaluations: int,
    seed: int,
) -> list[float]:
    """The best point that CMA-ES finds within bounds (Hansen, https://arxiv.org/abs/1604.00772)."""
    import numpy

    try:
        from cmaes import CMA  # type: ignore[import-untyped]
    except ImportError:
        raise HubError(
            "the package cmaes is not installed", "pip install 'experthub[lorahub]'"
        ) from None
    if len(start) == 1:
        return _line(loss, bound, evaluations)
    limits = numpy.array([[-bound, bound]] * len(start))
    search = CMA(mean=numpy.array(start), sigma=bound / 3, bounds=limits, seed=seed % 2**32)
    best, least = list(start), loss(start)
    told: list[tuple[Any, float]] = []
    for _ in range(evaluations - 1):
        point = search.ask()
        value = loss(point.tolist())
        if value < least:
            best, least = point.tolist(), value
        told.append((point, value))
        if len(told) == search.population_size:
            search.tell(told)
            told = []
    return best


def _line(loss: Callable[[Sequence[float]], float], bound: float, evaluations: int) -> list[float]:
    """CMA-ES needs two dimensions; in one, the best of even steps, zero among them."""
    points = torch.linspace(-bound, bound, max(evaluations - 1, 2)).tolist()
    return min(([x] for x in [0.0, *points]), key=loss)
