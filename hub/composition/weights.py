"""The tensors of stored experts, as task vectors and gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from experthub.hub.formats.adapter import Adapted
from experthub.hub.formats.safetensors_header import parsed
from experthub.hub.formats.task_vector import Stored, read_task_vector
from experthub.hub.recipes.plan import Member, Plan, PlannedExpert
from experthub.hub.registry.expert import ADAPTER, GATES, SKILLS
from experthub.hub.store.store import Store
from experthub.merge import Delta, Dense, LowRank, TaskVector, merges, tensorwise, truncated
from torch import Tensor

READERS = 2  # threads that verify files: hashing is bound by the processor
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Contents:
    """The verified files of experts, read by threads while other work goes on."""

    def __init__(self, members: Sequence[Member], store: Store, gates: bool) -> None:
        """gates: whether they are wanted too."""
        self._pool = ThreadPoolExecutor(READERS)
        self._files: dict[tuple[str, str], Future[Any]] = {}
        for member in members:
            if member.kind == "task_vector":
                for name in store.identity(member.digest).weights:
                    self._submit(store.file, member.digest, name)
            else:
                name = SKILLS if member.kind == "skills" else ADAPTER
                self._submit(store.read, member.digest, name)
            if gates and member.gated:
                self._submit(store.read, member.digest, GATES)

    def _submit(self, read: Callable[[str, str], Any], digest: str, name: str) -> None:
        if (digest, name) not in self._files:
            self._files[digest, name] = self._pool.submit(read, digest, name)

    def __getitem__(self, place: tuple[str, str]) -> Any:
        """One file by digest and name; IntegrityError when its bytes are damaged."""
        return self._files[place].result()

    def files(self, digest: str) -> dict[str, Path]:
        """The files of a task vector, by name."""
        return {name: self[digest, name] for of, name in self._files if of == digest}

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
    return tensorwise(partial(truncated, rank=expert.rank), [merged])[0]


def _stored_vector(member: Member, plan: Plan, contents: Contents, keep: set[str]) -> TaskVector:
    load: dict[str, Callable[[], Delta]]
    if member.kind == "task_vector":
        from safetensors import safe_open

        files = contents.files(member.digest)
        stored, opened = read_task_vector(files), {}
        for name, path in files.items():
            opened[name] = safe_open(path, framework="pt")
        # A tied weight is stored once, for all of its uses.
        stored |= {
            use: stored[n] for use, n in plan.base.tied.items() if use not in stored and n in stored
        }
        load = {
            n: partial(_dense, opened[stored[n].file], stored[n])
            for n in member.changes
            if n in keep
        }
    else:
        tensors = Tensors(contents[member.digest, ADAPTER])
        load = {
            f"{a.module}.weight": partial(_low_rank, tensors, a)
            for a in member.adapted
            if f"{a.module}.weight" in keep
        }
    return TaskVector(plan.base.fingerprint, load, seed=member.digest)


class Tensors:
    """The tensors of one small stored file in memory, each a view of its bytes."""

    def __init__(self, data: mmap) -> None:
        self.data = data
        self.header = parsed(data[8 : 8 + int.from_bytes(data[:8], "little")], len(data))

    def __getitem__(self, name: str) -> Tensor:
        info = self.header[name]
        dtype, count = DTYPES[info.dtype], math.prod(info.shape)
        flat = torch.frombuffer(self.data, dtype=dtype, count=count, offset=info.begin)
        return flat.view(info.shape)


def _dense(file: Any, stored: Stored) -> Delta:
    values = file.get_tensor(stored.values).float()
    if stored.mask is None:
        return Dense(values)
    return Dense(unpacked(file.get_tensor(stored.mask), values, stored.shape))


def unpacked(mask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros with the values where the mask's bits are set, the lowest bit first."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    found = torch.zeros(math.prod(shape), dtype=values.dtype)
    found[bits.flatten()[: len(found)].bool()] = values
    return found.view(shape)


def _low_rank(tensors: Tensors, adapted: Adapted) -> Delta:
    """The change of the parameter as stored: PEFT's B A, transposed for Conv1D and embeddings."""
    a, b = tensors[adapted.a].float(), tensors[adapted.b].float()
    if adapted.transposed or adapted.embedding:
        a, b = b.T.contiguous(), a.T.contiguous()
    return LowRank(a, b, adapted.scale)


def gates(expert: PlannedExpert, contents: Contents) -> dict[str, Tensor]:
    """Module -> gate `[I]`; for a merge of experts, the mean of its members' standardised gates."""
    from experthub.routing import standardised

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
