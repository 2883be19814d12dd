"""Banks: all experts of a composition, packed once into files that are mapped and not read.

What no token chooses is never read.  A bank lies in `$HUB_HOME/banks`, under the digest of what
decides its content, and may be removed at any time: the experts themselves are in the store.
`hub gc` removes one that was not used for a week.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from experthub.hub._files import digest_of, hub_home, new_folder
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.writer import Layout, safetensors_file
from experthub.hub.plan import Plan
from experthub.routing import MANY, Context, Packed, Rows, Screen, TopK
from torch import Tensor

LAYOUT = 3
LARGE = 100_000_000  # bytes of experts, from which on mapping a bank is faster than stacking them
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
FILE = "{:04d}.safetensors"
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
        content = [LAYOUT, plan.base.fingerprint, [e.content for e in plan.experts]]
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
        from safetensors import SafetensorError

        while not self.there:
            with suppress(FileExistsError):  # another process was faster
                self._write(make(), dtype)
        for folder in (self.experts, self.routers):
            with suppress(OSError):
                os.utime(folder)  # hub gc takes what was not used for long
        for number in range(len(list(self.routers.iterdir()))):
            try:
                yield self._part(FILE.format(number), context)
            except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
                raise IntegrityError(
                    f"the bank {self.experts.parent} is damaged: {error}", "remove that folder"
                ) from None

    def _write(self, made: Iterator[Part], dtype: torch.dtype) -> None:
        """Pack part after part; no more than one is in memory."""
        with ExitStack() as folders:
            there = self.experts.is_dir()
            routers = folders.enter_context(new_folder(self.routers, replace=not there))
            experts = None if there else folders.enter_context(new_folder(self.experts))
            for number, (names, packed) in enumerate(made):
                name = FILE.format(number)
                if experts is not None:
                    _save(experts / name, _experts(packed, dtype), {"modules": names})
                settings, tensors = _written(packed)
                _save(routers / name, tensors, {"router": settings})

    def _part(self, name: str, context: Context) -> Part:
        from safetensors import safe_open

        with safe_open(self.experts / name, framework="pt") as file:
            names = json.loads(file.metadata()["modules"])
            experts = tuple(file.get_tensor("experts").tolist())
            ranks = tuple(map(tuple, file.get_tensor("ranks").tolist()))
            a, b = file.get_tensor("a"), [file.get_tensor(f"b.{i}") for i in range(len(names))]
        with safe_open(self.routers / name, framework="pt") as file:
            settings = json.loads(file.metadata()["router"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        probes = tensors.pop(PROBES, None)
        if probes is not None:
            tensors["probes_PI"] = probes[: len(probes) // len(names)]
        screen = Screen.read(tensors)
        router = _read(settings, tensors, context)
        parts = () if probes is None else (probes,)
        packed = Packed(experts, ranks, (a,), tuple(b), router, parts, screen, mapped=True)
        return names, packed


def bank_for(plan: Plan) -> Bank | None:
    """The place for a plan's bank; None where its experts are so few that none pays."""
    route = plan.recipe.route is not None and not plan.skilled
    pays = route and sum(member.size for member in plan.members) >= LARGE
    return Bank.of(plan) if pays else None


def _experts(packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds of a group's experts: rows, and zeros at their end where ranks differ."""
    flat = [rank for own in packed.ranks for rank in own]
    pairs = enumerate(zip(packed.b, packed.ranks, strict=True))
    like = torch.empty(0, dtype=dtype)
    return {
        "a": _narrow(Rows(packed.a, flat, packed.rank, like).all),
        **{f"b.{i}": _narrow(Rows([r], own, packed.rank, like).all) for i, (r, own) in pairs},
        "experts": torch.tensor(packed.experts),
        "ranks": torch.tensor(packed.ranks),
    }


def _narrow(rows: Tensor) -> Tensor:
    """The same numbers in bfloat16, in which most experts come, if they are the same there."""
    half = rows.bfloat16()
    return half if torch.equal(half.to(rows.dtype), rows) else rows


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    layout = Layout(
        {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in held.items()},
        {key: json.dumps(value) for key, value in metadata.items()},
    )
    with safetensors_file(path, layout) as file:
        for name, tensor in held.items():
            file.put(name, _bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _written(packed: Packed) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
