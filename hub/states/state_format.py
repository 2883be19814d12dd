"""The file formats of states: the coefficients of a merge, and the tensors of a router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from experthub.hub.files.atomic import open_atomically, write_json
from experthub.hub.formats.coefficients import (
    COEFFICIENTS,
    COEFFICIENTS_JSON,
    TENSOR,
    CoefficientsRecord,
    read_coefficients,
)
from experthub.hub.formats.records import StateExpert
from experthub.hub.formats.router import ROUTER, ROUTER_JSON, RouterRecord, read_router
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.content import Content
from experthub.hub.store.store import Store
from experthub.merge import Coefficients, MethodError
from experthub.routing import State
from torch import Tensor


class StateRecord(Protocol):
    """The fields that the descriptions of all states have."""

    @property
    def method(self) -> str:
        """The method that made the state."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """The options with which it was made."""
        ...

    @property
    def experts(self) -> Any:
        """The experts that it was made for, with their digests, in order."""
        ...


@dataclass(frozen=True)
class StateFormat:
    """The files in which the states of one kind of method are stored.

    Args:
        kind: The name of the kind of expert, which is also the recipe's key for a stored state.
        tensors: The name of the file of tensors.
        description: The name of the file that describes them.
        describe: A function of a plan and a state that returns the description and the tensors.
        parse: A function of the two files that reads the description and the state.
        check: A function of a plan and a state that refuses, with a MethodError, what cannot be kept.
    """

    kind: str
    tensors: str
    description: str
    describe: Callable[[Plan, Any], tuple[Any, dict[str, Tensor]]]
    parse: Callable[[Path, Path], tuple[Any, Any]]
    check: Callable[[Plan, Any], None]

    def write(self, folder: Path, plan: Plan, state: Any) -> None:
        """Write the files of a state into a folder.

        Args:
            folder: An existing folder.
            plan: The plan whose method made the state.
            state: The state.
        """
        from safetensors.torch import save

        record, tensors = self.describe(plan, state)
        with open_atomically(folder / self.tensors) as file:
            file.write(save({name: _copy(tensor) for name, tensor in tensors.items()}))
        write_json(folder / self.description, record.model_dump(mode="json", by_alias=True))

    def read(self, folder: Path) -> tuple[Any, Any]:
        """Read a state from a folder.

        Args:
            folder: A folder that `write` wrote.

        Returns:
            The description and the state.

        Raises:
            IntegrityError: The files are damaged or do not fit each other.
        """
        return self.parse(folder / self.description, folder / self.tensors)

    def load(self, content: Content, store: Store) -> tuple[Any, Any]:
        """Read a state from the store.

        Args:
            content: The stored state.
            store: The store.

        Returns:
            The description and the state.

        Raises:
            NotFoundError: The content is not in the store.
            IntegrityError: The files are damaged or do not fit each other.
        """
        names = (self.description, self.tensors)
        record, tensors = (store.verify_file(content.digest, name) for name in names)
        return self.parse(record, tensors)


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor, because safetensors refuses tensors that share memory."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _check_coefficients(plan: Plan, found: Any) -> None:
    """Refuse a state that is not the coefficients of a plan's experts."""
    if not isinstance(found, Coefficients):
        raise _make_error(f"{type(found).__name__}, expected Coefficients")
    if len(found.values) != len(plan.experts):
        raise _make_error(
            f"coefficients of {len(found.values)} experts, and the recipe has {len(plan.experts)}"
        )


def _check_router(plan: Plan, found: Any) -> None:
    """Refuse a state that a router cannot read or that cannot be stored."""
    if not isinstance(found, State):
        raise _make_error(f"{type(found).__name__}, expected State")
    for name, tensor in found.tensors.items():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        if kind not in (torch.float32, torch.int64):
            raise _make_error(f"{name} as {kind}, expected torch.float32 or torch.int64")
        if not bool(torch.isfinite(tensor).all()):
            raise _make_error(f"NaN or infinity in {name}")


def _make_error(found: str) -> MethodError:
    """Make the error for a `prepare` that returns something else than a state."""
    return MethodError(f"prepare returned {found}", "correct the method's prepare function")


def _describe_coefficients(
    plan: Plan, found: Coefficients
) -> tuple[CoefficientsRecord, dict[str, Tensor]]:
    """Describe the coefficients of a merge."""
    record = CoefficientsRecord(
        method=plan.recipe.method.method,
        options=plan.recipe.method.options,
        granularity=found.granularity,
        combine=found.combine,
        experts=[StateExpert(expert=e.label, digest=e.digest) for e in plan.experts],
        blocks=list(found.blocks),
        objective=found.objective,
        data=plan.data.digest if plan.data else None,
        seed=found.seed,
        history=list(found.history),
    )
    return record, {TENSOR: found.values}


def _parse_coefficients(record: Path, tensors: Path) -> tuple[CoefficientsRecord, Coefficients]:
    """Read the coefficients of a merge."""
    from safetensors.torch import load

    found = read_coefficients(record, tensors)
    return found, Coefficients(
        load(tensors.read_bytes())[TENSOR].double(),
        tuple(found.blocks),
        found.granularity,
        found.combine,
        found.seed,
        tuple(found.history),
        found.objective,
    )


def _describe_router(plan: Plan, state: State) -> tuple[RouterRecord, dict[str, Tensor]]:
    """Describe the state of a router."""
    record = RouterRecord(
        method=plan.recipe.method.method,
        options=plan.recipe.method.options,
        experts=[StateExpert(expert=e.label, digest=e.digest) for e in plan.experts],
        embedder=state.embedder,
        data=plan.data.digest if plan.data else None,
        history=list(state.history),
    )
    return record, dict(state.tensors)


def _parse_router(record: Path, tensors: Path) -> tuple[RouterRecord, State]:
    """Read the state of a router."""
    from safetensors.torch import load

    found = read_router(record, tensors)
    return found, State(load(tensors.read_bytes()), found.embedder, found.history)


FORMATS: Mapping[str, StateFormat] = {
    "merge": StateFormat(
        "coefficients",
        COEFFICIENTS,
        COEFFICIENTS_JSON,
        _describe_coefficients,
        _parse_coefficients,
        _check_coefficients,
    ),
    "route": StateFormat(
        "router", ROUTER, ROUTER_JSON, _describe_router, _parse_router, _check_router
    ),
}


def format_of(plan: Plan) -> StateFormat:
    """Return the format in which a plan's method stores its state.

    Args:
        plan: A plan of one method.

    Returns:
        The format.
    """
    return FORMATS[plan.recipe.method.kind]
