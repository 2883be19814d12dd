"""The state of a router that has one: stored, found before, or made now; and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experthub.hub.errors import UsageError
from experthub.hub.files.atomic import hub_home, new_folder, write_json, written
from experthub.hub.formats.router import RoutedExpert, RouterRecord, read_router
from experthub.hub.progress import Report
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.expert import ROUTER, ROUTER_JSON, Expert
from experthub.hub.registry.registry import Registry
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import write_description
from experthub.hub.transfer.pull import Content
from torch import Tensor

# Options that the state itself depends on; the others are of its use.
SHAPING = ("examples", "depth", "size", "layerwise")


@dataclass(frozen=True)
class State:
    """What a router was made into.

    tensors: by name.  embedder: fingerprint of the base that made an index.  history: losses of training.
    """

    tensors: Mapping[str, Tensor]
    embedder: str | None = None
    history: list[float] = field(default_factory=list)


def state_of(plan: Plan, store: Store, make: Callable[[], State]) -> State:
    """The state that a plan's router has: named or pinned, found before, or made now and kept."""
    if plan.found is not None:
        record, state = stored_router(plan.found, store)
        _check_fit(record, plan, plan.found.reference)
        return state
    folder = _folder(plan)
    if not folder.is_dir():
        _keep(plan, make(), folder)
    return _read(folder / ROUTER_JSON, folder / ROUTER)[1]


def kept_router(
    plan: Plan, device: str | None, registry: Registry | None, store: Store, report: Report
) -> Content:
    """The state of a plan's router, made now unless it was before, as content of the store."""
    from experthub.hub.materials.router_making import make

    folder = _folder(plan)
    state_of(plan, store, lambda: make(plan, device, registry, store, report))
    digest, _ = store.add(folder)
    return Content(f"file:{folder}", digest, (f"file:{folder}",), None)


def stored_router(content: Content, store: Store) -> tuple[RouterRecord, State]:
    """What the store has of a router, and its tensors."""
    return _read(store.file(content.digest, ROUTER_JSON), store.file(content.digest, ROUTER))


def _folder(plan: Plan) -> Path:
    return hub_home() / "runs" / f"router-{plan.digest[7:23]}" / "found"


def _keep(plan: Plan, state: State, folder: Path) -> None:
    from safetensors.torch import save

    method = plan.recipe.method
    record = RouterRecord(
        method=method.method,
        options=method.options,
        experts=[RoutedExpert(expert=e.label, digest=e.digest) for e in plan.experts],
        embedder=state.embedder,
        data=plan.data.digest if plan.data else None,
        history=state.history,
    )
    with new_folder(folder) as draft:
        with written(draft / ROUTER) as file:
            file.write(save({name: t.contiguous() for name, t in state.tensors.items()}))
        write_json(draft / ROUTER_JSON, record.model_dump(mode="json", by_alias=True))
        identity = read_folder(draft).model_copy(update={"base_fingerprint": plan.base.fingerprint})
        described = Expert(
            name=method.method,
            kind="router",
            base=plan.base.name,
            digest=identity.digest,
            sources=[f"file:{folder}"],
            training={"data": plan.data.record()} if plan.data else {},
        )
        write_description(draft, described, identity)


def _read(record: Path, tensors: Path) -> tuple[RouterRecord, State]:
    from safetensors.torch import load

    found = read_router(record, tensors)
    return found, State(load(tensors.read_bytes()), found.embedder, found.history)


def _check_fit(found: RouterRecord, plan: Plan, name: str) -> None:
    """Refuse a router of another method, of other options that shape it, or of other experts."""
    method = plan.recipe.method
    if found.method != method.method:
        raise UsageError(
            f"{name} was made for {found.method}, and the recipe says {method.method}",
            f"say method: {found.method}",
        )
    for option in SHAPING:
        there, here = found.options.get(option), method.options.get(option)
        if there != here:
            raise UsageError(
                f"{name} was made with {option} {there}, and the recipe says {here}",
                f"say {option}: {there}",
            )
    made = {e.digest: e.expert for e in found.experts}
    if list(made) == [e.digest for e in plan.experts]:
        return
    changed = next((e.label for e in plan.experts if e.digest not in made), None)
    why = f"not for {changed} as it is now" if changed else "in another order or for more experts"
    raise UsageError(
        f"{name} was made for {', '.join(made.values())}, {why}",
        "make it again with hub router, or leave router: out",
    )
