"""The tensors of stored experts, as task vectors and gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.hub.files.patterns import is_named
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.kinds import kinds
from experthub.hub.kinds.lora import GATES
from experthub.hub.recipes.plan import Member, Plan, PlannedExpert
from experthub.hub.store.store import Store
from experthub.merge import TaskVector, map_tensors, merges, truncate
from experthub.routing import standardised
from torch import Tensor

READERS = 2  # threads that verify files: hashing is bound by the processor


class Contents:
    """The verified files of experts, read by threads while other work goes on."""

    def __init__(self, members: Sequence[Member], store: Store, gates: bool) -> None:
        """gates: whether they are wanted too."""
        self._pool = ThreadPoolExecutor(READERS)
        self._files: dict[tuple[str, str], Future[Any]] = {}
        for member in members:
            kind = kinds[member.kind]
            for name in kind.mapped:
                self._submit(store.read, member.digest, name)
            if kind.opened:
                for name in sorted(store.identity(member.digest).files):
                    if is_named(name, kind.opened):
                        self._submit(store.file, member.digest, name)
            if gates and member.gated:
                self._submit(store.read, member.digest, GATES)

    def _submit(self, read: Callable[[str, str], Any], digest: str, name: str) -> None:
        if (digest, name) not in self._files:
            self._files[digest, name] = self._pool.submit(read, digest, name)

    def __getitem__(self, place: tuple[str, str]) -> Any:
        """One file by digest and name; IntegrityError when its bytes are damaged."""
        return self._files[place].result()

    def of(self, member: Member) -> dict[str, Any]:
        """Return the files that hold a member's change.

        Args:
            member: One of the members that were given.

        Returns:
            File name -> its bytes, or its path for a file that the kind opens.
        """
        kind = kinds[member.kind]
        if kind.opened:
            names = [name for of, name in self._files if of == member.digest]
            return {n: self[member.digest, n] for n in names if is_named(n, kind.opened)}
        return {name: self[member.digest, name] for name in kind.mapped}

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def task_vector(expert: PlannedExpert, plan: Plan, contents: Contents) -> TaskVector:
    """One expert of a plan as a lazy task vector, in float32, limited to the plan's parameters."""
    keep = set(plan.parameters)
    vectors = [_stored_vector(member, plan, contents, keep) for member in expert.members]
    if expert.merge is None:
        return vectors[0]
    weights = torch.tensor([member.weight for member in expert.members])
    merged: TaskVector = merges[expert.merge.method].call(vectors, weights, **expert.merge.options)
    if expert.rank is None:
        return merged
    return map_tensors(partial(truncate, rank=expert.rank), [merged])[0]


def _stored_vector(member: Member, plan: Plan, contents: Contents, keep: set[str]) -> TaskVector:
    """Return a stored expert's change as a lazy task vector, limited to some parameters."""
    kind = kinds[member.kind]
    if kind.load is None:
        raise UsageError(
            f"{member.reference} is {kind.label}, and is not one change of the weights",
            "leave it out, or use a route that is over it alone",
        )
    changes = kind.load(contents.of(member), member.footprint, plan.base)
    load = {name: change for name, change in changes.items() if name in keep}
    return TaskVector(plan.base.fingerprint, load, seed=member.digest)


def gates(expert: PlannedExpert, contents: Contents) -> dict[str, Tensor]:
    """Module -> gate `[I]`; for a merge of experts, the mean of its members' standardised gates."""
    found: dict[str, list[Tensor]] = {}
    for member in expert.members:
        if not member.gated:
            continue
        tensors = Tensors(contents[member.digest, GATES])
        for module in member.gated:
            found.setdefault(module, []).append(tensors[f"{module}.gate"].float())
    if expert.merge is None:
        return {module: rows[0] for module, rows in found.items()}
    return {module: standardised(torch.stack(rows)).mean(0) for module, rows in found.items()}
