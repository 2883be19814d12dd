"""Banks: all experts of a composition, packed once into files that are mapped instead of read.

Experts that no token chooses are never read from the disk. A bank lies in `$HUB_HOME/banks`, under
a digest of everything that decides its content. It is a cache and may be removed at any time,
because the experts themselves are in the store. `hub gc` removes a bank that was not used for a
week.
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
from experthub.hub.files.atomic import create_folder, hub_home
from experthub.hub.files.digests import digest_of
from experthub.hub.formats.mapped_tensors import MappedTensors, TensorsWriter
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import is_large
from experthub.merge import ShapesExperts
from experthub.routing import (
    MIN_PREFILTERED_EXPERTS,
    Context,
    ExpertRows,
    PackedExperts,
    Prefilter,
    TopK,
)
from torch import Tensor

# Increase this number when a bank stores anything in another layout or under another name, classes
# of routers included. Banks of the old layout are then not found, and are written anew.
LAYOUT = 6
PROBES = "probes"  # The key of the probes of all modules of a group.

# The names of modules that share an input, and their packed experts.
NamedGroup = tuple[list[str], PackedExperts]


@dataclass(frozen=True)
class Bank:
    """The place of the packed experts of a plan.

    Attributes:
        experts: The folder of the experts' factors, which several routers share.
        routers: The folder of what one router computed from the experts.
    """

    experts: Path
    routers: Path

    @classmethod
    def of(cls, plan: Plan) -> Bank:
        """Return the place for a plan's bank, whether it exists or not.

        Args:
            plan: A plan with one route.

        Returns:
            The bank.
        """
        content: list[Any] = [LAYOUT, plan.base.digest, plan.contents]
        shaping = plan.recipe.method.find_options(ShapesExperts)
        if any(value is not None for value in shaping.values()):  # Such options may name experts.
            content += [shaping, [expert.label for expert in plan.experts]]
        key = digest_of([*content, list(plan.parameters), plan.dtype])[7:23]
        folder = hub_home() / "banks" / key
        return cls(folder / "experts", folder / f"router-{plan.digest[7:23]}")

    @property
    def is_complete(self) -> bool:
        """True if both folders exist; each appears as a whole."""
        return self.routers.is_dir() and self.experts.is_dir()

    def load_groups(
        self, pack: Callable[[], Iterator[NamedGroup]], context: Context
    ) -> Iterator[NamedGroup]:
        """Load all groups of the bank, and write them first if it is not complete.

        Args:
            pack: A function that packs all groups, in the dtype of the composition, on the CPU and
                not fused.
            context: The state of the current batch, which routers of whole examples read.

        Yields:
            The names of each group's modules, and their experts, whose tensors are mapped.

        Raises:
            IntegrityError: Files of the bank cannot be read.
        """
        while not self.is_complete:
            with suppress(FileExistsError):  # Another process was faster.
                self._write(pack())
        for folder in (self.experts, self.routers):
            with suppress(OSError):
                os.utime(folder)  # `hub gc` removes banks that were not used for long.
        try:
            experts, routers = MappedTensors(self.experts), MappedTensors(self.routers)
            for number in range(len(experts)):
                yield _load_group(experts, routers, number, context)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
            raise IntegrityError(
                f"the bank {self.experts.parent} is damaged: {error}",
                "remove that folder; the next composition writes it again",
            ) from error

    def _write(self, groups: Iterator[NamedGroup]) -> None:
        """Write one group after the other, so that only one is in memory."""
        with ExitStack() as stack:
            there = self.experts.is_dir()
            folders = [stack.enter_context(create_folder(self.routers, replace=not there))]
            if not there:
                folders.append(stack.enter_context(create_folder(self.experts)))
            files = [stack.enter_context(TensorsWriter(folder)) for folder in folders]
            for names, packed in groups:
                files[0].put(*_describe_router(packed))
                for file in files[1:]:
                    file.put(*_describe_experts(names, packed))


def find_bank(plan: Plan) -> Bank | None:
    """Return the place for a plan's bank.

    Args:
        plan: A plan, or one part of it.

    Returns:
        The bank; None if the plan has no route, or so few experts that a bank saves no time.
    """
    route = plan.recipe.route is not None and not plan.skilled
    return Bank.of(plan) if route and is_large(plan.members) else None


def _load_group(
    experts: MappedTensors, routers: MappedTensors, number: int, context: Context
) -> NamedGroup:
    """Load a group by its number."""
    settings, rows = experts[number]
    names = list(settings["modules"])
    router_settings, tensors = routers[number]
    probes = tensors.pop(PROBES, None)
    if probes is not None:
        tensors["probes_PI"] = probes[: len(probes) // len(names)]
    prefilter = Prefilter.from_tensors(tensors)
    router = _load_router(router_settings, tensors, context)
    ranks = tuple(_decode_runs(tuple(map(tuple, runs)), 0) for runs in settings["ranks"])
    rank, own = max(map(max, ranks)), _decode_runs(tuple(map(tuple, settings["experts"])), 1)
    a = ExpertRows.of([rows["a"]], [*chain(*ranks)], rank)
    b = tuple(ExpertRows.of([rows[f"b.{i}"]], r, rank) for i, r in enumerate(ranks))
    return names, PackedExperts.of(own, ranks, a, b, router, probes, prefilter)


def _describe_experts(
    names: list[str], packed: PackedExperts
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a group's experts as plain values, and the rows of their factors."""
    settings = {
        "modules": names,
        "experts": _encode_runs(packed.experts, 1),
        "ranks": [_encode_runs(own, 0) for own in packed.ranks],
    }
    return settings, {
        "a": _narrow(packed.a.matrix),
        **{f"b.{i}": _narrow(rows.matrix) for i, rows in enumerate(packed.b)},
    }


def _encode_runs(numbers: Sequence[int], step: int) -> list[list[int]]:
    """Encode numbers as runs of equal steps, each as its first number and its length."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][0] + step * found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


@lru_cache(maxsize=16)
def _decode_runs(runs: tuple[tuple[int, int], ...], step: int) -> tuple[int, ...]:
    """Decode what `_encode_runs` encoded with the same step."""
    parts = (range(first, first + n) if step else repeat(first, n) for first, n in runs)
    return tuple(chain.from_iterable(parts))


def _narrow(rows: Tensor) -> Tensor:
    """Convert rows to bfloat16 if it holds them exactly, which it does for most stored experts."""
    half = rows.bfloat16()
    return half if torch.equal(half.to(rows.dtype), rows) else rows


def _describe_router(packed: PackedExperts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a group's router as its class with plain values, and as tensors.

    The probes of all modules are one tensor.
    """
    router: Any = packed.router
    values = {field.name: getattr(router, field.name) for field in fields(router)}
    tensors = {n: v for n, v in values.items() if isinstance(v, Tensor) and n != "probes_PI"}
    if packed.probes is not None:
        tensors[PROBES] = packed.probes
        if isinstance(router, TopK) and len(packed.experts) >= MIN_PREFILTERED_EXPERTS:
            tensors |= Prefilter.of(packed.probes, len(packed.b)).tensors
    plain = {n: v for n, v in values.items() if not isinstance(v, Tensor | Context)}
    return {"class": _locate_class(type(router)), "values": plain}, tensors


def _locate_class(router_type: type) -> list[str]:
    """Return the module and the name by which a class is found again.

    A package that exports the class is preferred, because private modules may be renamed.
    """
    module, name = router_type.__module__, router_type.__qualname__
    package = module.partition("._")[0]
    exported = getattr(sys.modules[package], name, None) is router_type
    return [package if exported else module, name]


def _load_router(settings: dict[str, Any], tensors: Mapping[str, Tensor], context: Context) -> Any:
    """Make the router that was written; its module is loaded already, so nothing is imported."""
    place, name = settings["class"]
    router_type: Any = getattr(sys.modules[place], name)
    if not (isinstance(router_type, type) and is_dataclass(router_type)):
        raise ValueError(f"{name} is not a router")
    names = {field.name for field in fields(router_type)}
    own = {name: tensor for name, tensor in tensors.items() if name in names}
    shared = {"context": context} if "context" in names else {}
    router: Any = router_type(**settings["values"], **own, **shared)
    return router
