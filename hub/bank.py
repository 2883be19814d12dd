"""Banks: all experts of a composition, packed once into files that are mapped and not read.

What no token chooses is never read.  A bank lies in `$HUB_HOME/banks`, under the digest of what
decides its content, and may be removed at any time: the experts themselves are in the store.
"""

from __future__ import annotations

import json
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
from experthub.routing import Packed, Rows, Selected
from torch import Tensor

LAYOUT = 1
LARGE = 100_000_000  # bytes of experts, from which on mapping a bank is faster than stacking them
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
FILE = "{:04d}.safetensors"

# Modules that share an input, their experts, and the router of each; None where one chooses for all.
Part = tuple[list[str], Packed, list[Any]]


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
        key = digest_of([*content, list(plan.parameters), plan.dtype])[7:23]
        folder = hub_home() / "banks" / key
        return cls(folder / "experts", folder / f"router-{plan.digest[7:23]}")

    @property
    def there(self) -> bool:
        return self.routers.is_dir() and self.experts.is_dir()

    def parts(self, make: Callable[[], Iterator[Part]], dtype: torch.dtype) -> Iterator[Part]:
        """Everything in the bank; what is missing of it is made and written first.

        Raises IntegrityError for files that cannot be read.
        """
        from safetensors import SafetensorError

        while not self.there:
            with suppress(FileExistsError):  # another process was faster
                self._write(make(), dtype)
        for number in range(len(list(self.routers.iterdir()))):
            try:
                yield self._part(FILE.format(number))
            except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
                raise IntegrityError(
                    f"the bank {self.experts.parent} is damaged: {error}", "remove that folder"
                ) from None

    def _write(self, made: Iterator[Part], dtype: torch.dtype) -> None:
        """Pack part after part; no more than one is in memory."""
        like = torch.empty(0, dtype=dtype)
        with ExitStack() as folders:
            there = self.experts.is_dir()
            routers = folders.enter_context(new_folder(self.routers, replace=not there))
            experts = None if there else folders.enter_context(new_folder(self.experts))
            for number, (names, packed, found) in enumerate(made):
                name = FILE.format(number)
                if experts is not None:
                    _save(experts / name, _tensors(packed, like), {"modules": names})
                own = {
                    f"{i}.{field}": value
                    for i, router in enumerate(found)
                    for field, value in _fields(router).items()
                    if isinstance(value, Tensor)
                }
                _save(routers / name, own, {"routers": list(map(_settings, found))})

    def _part(self, name: str) -> Part:
        from safetensors import safe_open

        with safe_open(self.experts / name, framework="pt") as file:
            names = json.loads(file.metadata()["modules"])
            packed = Packed(
                tuple(file.get_tensor("experts").tolist()),
                tuple(map(tuple, file.get_tensor("ranks").tolist())),
                (file.get_tensor("a"),),
                tuple(file.get_tensor(f"b.{i}") for i in range(len(names))),
                mapped=True,
            )
        with safe_open(self.routers / name, framework="pt") as file:
            settings = json.loads(file.metadata()["routers"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return names, packed, [_router(own, tensors, i) for i, own in enumerate(settings)]


def bank_for(plan: Plan) -> Bank | None:
    """The place for a plan's bank; None where its experts are so few that none pays."""
    route = plan.recipe.route is not None and not plan.skilled
    pays = route and sum(member.size for member in plan.members) >= LARGE
    return Bank.of(plan) if pays else None


def _tensors(packed: Packed, like: Tensor) -> dict[str, Tensor]:
    """What a file holds of a group: its rows as they are used, zeros at the end where ranks differ."""
    flat = [rank for own in packed.ranks for rank in own]
    pairs = enumerate(zip(packed.b, packed.ranks, strict=True))
    return {
        "a": Rows(packed.a, flat, packed.rank, like).all,
        **{f"b.{i}": Rows([rows], own, packed.rank, like).all for i, (rows, own) in pairs},
        "experts": torch.tensor(packed.experts),
        "ranks": torch.tensor(packed.ranks),
    }


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


def _fields(router: Any) -> dict[str, Any]:
    """A router's values by name; none for what chooses for the whole model."""
    if isinstance(router, Selected):
        return {}
    return {field.name: getattr(router, field.name) for field in fields(router)}


def _settings(router: Any) -> dict[str, Any] | None:
    """A router's class, and its values but for tensors; None for what chooses for the whole model."""
    if isinstance(router, Selected):
        return None
    values = {n: v for n, v in _fields(router).items() if not isinstance(v, Tensor)}
    return {"class": [type(router).__module__, type(router).__qualname__], "values": values}


def _router(settings: dict[str, Any] | None, tensors: Mapping[str, Tensor], module: int) -> Any:
    """The router that was written: of a class that is loaded already, nothing is imported."""
    if settings is None:
        return None
    place, name = settings["class"]
    kind: Any = getattr(sys.modules[place], name)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"{name} is no router")
    start = f"{module}."
    own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    router: Any = kind(**settings["values"], **own)
    return router
