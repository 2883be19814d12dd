"""Stored experts as tensors: task vectors and gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from experthub.hub.errors import UsageError
from experthub.hub.files.patterns import matches_any
from experthub.hub.formats.adapter import GATES
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.kinds import kinds
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import Member, PlannedExpert
from experthub.hub.store.store import Store
from experthub.merge import TaskVector, map_tensors, merges, truncate
from experthub.routing import standardise
from torch import Tensor

READERS = 2  # Threads that verify files; hashing is bound by the processor.


class Contents:
    """The verified files of experts, which threads read while other work goes on.

    Args:
        members: The experts.
        store: The store that holds their files.
        gates: Whether the experts' gates are read too.
    """

    def __init__(self, members: Sequence[Member], store: Store, gates: bool) -> None:
        self._pool = ThreadPoolExecutor(READERS)
        self._files: dict[tuple[str, str], Future[Any]] = {}
        for member in members:
            kind = kinds[member.kind]
            for name in kind.mapped:
                self._submit(store.read, member.digest, name)
            if kind.opened:
                for name in sorted(store.read_identity(member.digest).files):
                    if matches_any(name, kind.opened):
                        self._submit(store.verify_file, member.digest, name)
            if gates and member.gated:
                self._submit(store.read, member.digest, GATES)

    def _submit(self, read: Callable[[str, str], Any], digest: str, name: str) -> None:
        """Start to read a file, unless that was done before."""
        if (digest, name) not in self._files:
            self._files[digest, name] = self._pool.submit(read, digest, name)

    def __getitem__(self, place: tuple[str, str]) -> Any:
        """Return a file by digest and name; raise IntegrityError if its bytes are damaged."""
        return self._files[place].result()

    def collect(self, member: Member) -> dict[str, Any]:
        """Return the files that hold a member's change.

        Args:
            member: One of the members that the constructor got.

        Returns:
            File name -> its bytes, or its path for a file that the kind opens.

        Raises:
            IntegrityError: A file is damaged.
        """
        kind = kinds[member.kind]
        if kind.opened:
            names = [name for of, name in self._files if of == member.digest]
            return {n: self[member.digest, n] for n in names if matches_any(n, kind.opened)}
        return {name: self[member.digest, name] for name in kind.mapped}

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def load_task_vector(expert: PlannedExpert, plan: Plan, contents: Contents) -> TaskVector:
    """Load an expert of a plan as a lazy task vector in float32.

    Args:
        expert: The expert. A nested merge is merged, and truncated if it has a rank.
        plan: The plan; changes of parameters that it does not name are left out.
        contents: The experts' files.

    Returns:
        The task vector, without the expert's weight.

    Raises:
        UsageError: The expert is of a kind that is not one change of the weights.
        IntegrityError: A file is damaged.
    """
    keep = set(plan.parameters)
    vectors = [_load_stored_vector(member, plan, contents, keep) for member in expert.members]
    if expert.merge is None:
        return vectors[0]
    weights = torch.tensor([member.weight for member in expert.members])
    merged: TaskVector = merges[expert.merge.method].call(vectors, weights, **expert.merge.options)
    if expert.rank is None:
        return merged
    return map_tensors(partial(truncate, rank=expert.rank), [merged])[0]


def _load_stored_vector(
    member: Member, plan: Plan, contents: Contents, keep: set[str]
) -> TaskVector:
    """Load the change of a stored expert as a lazy task vector, limited to some parameters."""
    kind = kinds[member.kind]
    if kind.load is None:
        raise UsageError(
            f"{member.reference} is {kind.label}, which is not one change of the weights",
            "remove it, or write a route that has no other expert",
        )
    changes = kind.load(contents.collect(member), member.footprint, plan.base)
    load = {name: change for name, change in changes.items() if name in keep}
    return TaskVector(plan.base.fingerprint, load, seed=member.digest)


def load_gates(expert: PlannedExpert, contents: Contents) -> dict[str, Tensor]:
    """Load the gates of an expert.

    Args:
        expert: The expert. A nested merge gets the mean of its members' standardised gates.
        contents: The experts' files, gates included.

    Returns:
        Module path -> gate `[I]` in float32; empty for an expert without gates.

    Raises:
        IntegrityError: A file is damaged.
    """
    found: dict[str, list[Tensor]] = {}
    for member in expert.members:
        if not member.gated:
            continue
        tensors = Tensors(contents[member.digest, GATES])
        for module, gate in member.gated.items():
            found.setdefault(module, []).append(tensors[gate].float())
    if expert.merge is None:
        return {module: rows[0] for module, rows in found.items()}
    return {module: standardise(torch.stack(rows)).mean(0) for module, rows in found.items()}
