"""Banks: all experts of a composition, packed once into files that are mapped and not read.

What no token chooses is never read.  A bank lies in `$HUB_HOME/banks`, under the digest of what
decides its content, and may be removed at any time: the experts themselves are in the store.
`hub gc` removes one that was not used for a week.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import digest_of, hub_home, new_folder
from experthub.hub.formats.mapped_tensors import MappedTensors, TensorsWriter
from experthub.hub.recipes.plan import Plan, is_large
from experthub.routing import MANY, Context, Packed, Rows, Screen, TopK
from torch import Tensor

LAYOUT = 5
PROBES = "probes"  # of all modules of a group

# Modules that share an input, their experts and routers.
Part = tuple[list[str], Packed]


@dataclass(frozen=True)
class Bank:
    """Where the packed experts of a plan are, a file for each group of modules.

    experts: a folder that several routers share.  routers: what one router made of them.
    """

    experts: Path
    routers: Path

    @classmethod
    def of(cls, plan: Plan) -> Bank:
        """The place for a plan's bank, whether it is there or not."""
        content = [LAYOUT, plan.base.fingerprint, plan.contents]
        content += [plan.general] if plan.general else []
        key = digest_of([*content, list(plan.parameters), plan.dtype])[7:23]
        folder = hub_home() / "banks" / key
        return cls(folder / "experts", folder / f"router-{plan.digest[7:23]}")

    @property
    def there(self) -> bool:
        return self.routers.is_dir() and self.experts.is_dir()

    def parts(
        self, make: Callable[[], Iterator[Part]], dtype: torch.dtype, context: Context
    ) -> Iterator[Part]:
        """Everything in the bank; what is missing of it is made and written first.

        dtype: that the experts are used in.  context: that routers of whole examples look at.
        Raises IntegrityError for files that cannot be read.
        """
        while not self.there:
            with suppress(FileExistsError):  # another process was faster
                self._write(make(), dtype)
        for folder in (self.experts, self.routers):
            with suppress(OSError):
                os.utime(folder)  # hub gc takes what was not used for long
        try:
            experts, routers = MappedTensors(self.experts), MappedTensors(self.routers)
            for number in range(len(experts)):
                yield _part(experts, routers, number, context)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
            raise IntegrityError(
                f"the bank {self.experts.parent} is damaged: {error}", "remove that folder"
            ) from None

    def _write(self, made: Iterator[Part], dtype: torch.dtype) -> None:
        """Pack part after part; no more than one is in memory."""
        with ExitStack() as stack:
            there = self.experts.is_dir()
            folders = [stack.enter_context(new_folder(self.routers, replace=not there))]
            if not there:
                folders.append(stack.enter_context(new_folder(self.experts)))
            files = [stack.enter_context(TensorsWriter(folder)) for folder in folders]
            for names, packed in made:
                files[0].put(*_router(packed))
                for file in files[1:]:
                    file.put(*_experts(names, packed, dtype))


def _part(experts: MappedTensors, routers: MappedTensors, number: int, context: Context) -> Part:
    settings, rows = experts[number]
    names = list(settings["modules"])
    b = tuple(rows[f"b.{i}"] for i in range(len(names)))
    made, tensors = routers[number]
    probes = tensors.pop(PROBES, None)
    if probes is not None:
        tensors["probes_PI"] = probes[: len(probes) // len(names)]
    screen = Screen.read(tensors)
    router = _read(made, tensors, context)
    parts = () if probes is None else (probes,)
    ranks = tuple(_unrolled(tuple(map(tuple, runs)), 0) for runs in settings["ranks"])
    own = _unrolled(tuple(map(tuple, settings["experts"])), 1)
    return names, Packed(own, ranks, (rows["a"],), b, router, parts, screen, mapped=True)


def bank_for(plan: Plan) -> Bank | None:
    """The place for a plan's bank; None where its experts are so few that none pays."""
    route = plan.recipe.route is not None and not plan.skilled
    return Bank.of(plan) if route and is_large(plan.members) else None


def _experts(
    names: list[str], packed: Packed, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is kept of a group's experts: rows, and zeros at their end where ranks differ."""
    flat = [rank for own in packed.ranks for rank in own]
    pairs = enumerate(zip(packed.b, packed.ranks, strict=True))
    like = torch.empty(0, dtype=dtype)
    settings = {
        "modules": names,
        "experts": _runs(packed.experts, 1),
        "ranks": [_runs(own, 0) for own in packed.ranks],
    }
    return settings, {
        "a": _narrow(Rows(packed.a, flat, packed.rank, like).all),
        **{f"b.{i}": _narrow(Rows([r], own, packed.rank, like).all) for i, (r, own) in pairs},
    }


def _runs(numbers: Sequence[int], step: int) -> list[list[int]]:
    """Numbers as runs, each its first and how many there are: a thousand are mostly one."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][0] + step * found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


@lru_cache(maxsize=16)
def _unrolled(runs: tuple[tuple[int, int], ...], step: int) -> tuple[int, ...]:
    parts = (range(first, first + n) if step else repeat(first, n) for first, n in runs)
    return tuple(chain.from_iterable(parts))


def _narrow(rows: Tensor) -> Tensor:
    """The same numbers in bfloat16, in which most experts come, if they are the same there."""
    half = rows.bfloat16()
    return half if torch.equal(half.to(rows.dtype), rows) else rows


def _router(packed: Packed) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A group's router as its class and plain values, and tensors: the probes of all modules in one."""
    router: Any = packed.router
    values = {field.name: getattr(router, field.name) for field in fields(router)}
    tensors = {n: v for n, v in values.items() if isinstance(v, Tensor) and n != "probes_PI"}
    if packed.probes:
        tensors[PROBES] = torch.cat(packed.probes)
        if isinstance(router, TopK) and len(packed.experts) >= MANY:
            tensors |= Screen.of(tensors[PROBES], len(packed.ranks)).tensors
    plain = {n: v for n, v in values.items() if not isinstance(v, Tensor | Context)}
    kind = type(router)
    return {"class": [kind.__module__, kind.__qualname__], "values": plain}, tensors


def _read(settings: dict[str, Any], tensors: Mapping[str, Tensor], context: Context) -> Any:
    """The router that was written: of a class that is loaded already, nothing is imported."""
    place, name = settings["class"]
    kind: Any = getattr(sys.modules[place], name)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"{name} is no router")
    names = {field.name for field in fields(kind)}
    own = {name: tensor for name, tensor in tensors.items() if name in names}
    shared = {"context": context} if "context" in names else {}
    router: Any = kind(**settings["values"], **own, **shared)
    return router
