"""Stored experts as tensors: task vectors and gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from experthub.hub.composition.vocabulary import Embeddings
from experthub.hub.errors import UsageError
from experthub.hub.files.patterns import matches_any
from experthub.hub.formats.adapter import ADAPTER, GATES
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.kinds import kinds
from experthub.hub.kinds.kind import Changes
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import Member, PlannedExpert
from experthub.hub.store.store import Store
from experthub.merge import Delta, TaskVector, map_tensors, merges, sum_deltas, truncate
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
        self._embeddings: Embeddings | None = None
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

    def open_embeddings(self, plan: Plan) -> Embeddings | None:
        """Return the rows of tokens in a plan's composition.

        Args:
            plan: The plan of the members.

        Returns:
            The embeddings; None if the plan has the vocabulary of its base.
        """
        if self._embeddings is None and plan.vocabulary is not None:
            members = {member.digest: member for member in plan.members}
            self._embeddings = Embeddings(
                plan.base,
                plan.vocabulary,
                lambda digest: (
                    _load_dense_changes(members[digest], plan, self) if digest in members else None
                ),
                plan.separate,
            )
        return self._embeddings

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
    merged = _merge_members(expert, [_load_vector(m, plan, contents) for m in expert.members])
    if expert.rank is None:
        return merged
    return map_tensors(partial(truncate, rank=expert.rank), [merged])[0]


def load_dense_vector(plan: Plan, contents: Contents) -> TaskVector:
    """Load the dense parts that a plan takes from one expert.

    Args:
        plan: A plan of one method, with dense parts.
        contents: The experts' files.

    Returns:
        The changes of the parameters `plan.dense`, without the expert's weight. Those that the
        expert does not change are left out.
    """
    expert, keep = plan.dense_expert, set(plan.dense)

    def load(member: Member) -> TaskVector:
        changes = _align(member, plan, contents, _load_dense_parts(member, plan, contents))
        load = {name: change for name, change in changes.items() if name in keep}
        return TaskVector(plan.base.fingerprint, load, seed=member.digest)

    return _merge_members(expert, [load(member) for member in expert.members])


def load_lacking(plan: Plan, contents: Contents) -> dict[str, Tensor]:
    """Load the weights that the base lacks, from an expert that brings them along.

    Args:
        plan: The plan, whose experts have equal ones unless it names one expert.
        contents: The experts' files.

    Returns:
        The weights by parameter, as the expert stores them.
    """
    found: dict[str, Tensor] = {}
    for member in plan.dense_expert.members if plan.base.lacks else ():
        for name in plan.base.lacks & member.footprint.dense.keys():
            part = member.footprint.dense[name][-1]
            found[name] = Tensors(contents[member.digest, ADAPTER])[part.tensor]
    return found


def _merge_members(expert: PlannedExpert, vectors: Sequence[TaskVector]) -> TaskVector:
    """Merge the members of a nested merge; return the only member of another expert."""
    if expert.merge is None:
        return vectors[0]
    weights = torch.tensor([member.weight for member in expert.members])
    merged: TaskVector = merges[expert.merge.method].call(vectors, weights, **expert.merge.options)
    return merged


def _load_dense_parts(member: Member, plan: Plan, contents: Contents) -> Changes:
    """Return the changes by the dense parts of a stored expert."""
    load = kinds[member.kind].load_dense
    if load is None or not member.footprint.dense:
        return {}
    return load(contents.collect(member), member.footprint, plan.base)


def _load_dense_changes(member: Member, plan: Plan, contents: Contents) -> Changes:
    """Return the changes of a stored expert that are not low-rank."""
    kind = kinds[member.kind]
    if kind.low_rank or kind.load is None:
        return _load_dense_parts(member, plan, contents)
    return kind.load(contents.collect(member), member.footprint, plan.base)


def _align(member: Member, plan: Plan, contents: Contents, changes: Changes) -> Changes:
    """Return changes by the rows of the composition's vocabulary."""
    embeddings = contents.open_embeddings(plan)
    return changes if embeddings is None else embeddings.align(member.digest, changes)


def _load_vector(member: Member, plan: Plan, contents: Contents) -> TaskVector:
    """Load the change of a stored expert as a lazy task vector, limited to the plan's parameters."""
    kind, keep = kinds[member.kind], set(plan.parameters)
    if kind.load is None:
        raise UsageError(
            f"{member.reference} is {kind.label}, which is not one change of the weights",
            "remove it, or write a route that has no other expert",
        )
    loaded = kind.load(contents.collect(member), member.footprint, plan.base)
    changes = dict(_align(member, plan, contents, loaded))
    if not plan.takes_dense:
        parts = _load_dense_parts(member, plan, contents)
        for name, change in _align(member, plan, contents, parts).items():
            changes[name] = (
                partial(_add_changes, changes[name], change) if name in changes else change
            )
    load = {name: change for name, change in changes.items() if name in keep}
    return TaskVector(plan.base.fingerprint, load, seed=member.digest)


def _add_changes(*changes: Callable[[], Delta]) -> Delta:
    """Return the sum of several changes of one parameter."""
    return sum_deltas([change() for change in changes])


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
