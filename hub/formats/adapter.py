"""Reading the low-rank changes of LoRA adapters in PEFT's format, and gates.

Only headers and JSON are read. An adapter is read exactly, or rejected with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from experthub.hub.bases.names import Piece
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.json_files import read_json, read_small
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.formats.dense_parts import (
    FACTOR,
    DensePart,
    check_declared_parts,
    find_dense_part,
)
from experthub.hub.formats.lora_config import check_config
from experthub.hub.formats.peft_rules import find_rank_and_scale, is_targeted, list_targeted_leaves
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    parse_header,
    read_header,
    read_header_text,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
GATES = "phatgoose_gates.safetensors"


@dataclass(frozen=True)
class Targeted:
    """A parameter that `target_parameters` may name: peft adapts it without adapting its module.

    Args:
        leaf: The name of the parameter in its module.
        rank: The rank of its change. A stack of N matrices has factors of N times this rank.
        scale: The factor of its change.
    """

    leaf: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapted:
    """The low-rank change `scale * B A` of a parameter, which is mostly `<module>.weight`.

    Args:
        module: The path of the module.
        rank: The rank R of A and B.
        scale: The factor of the change.
        shape: The shape of the parameter.
        a: The name of the tensor A in the file.
        b: The name of the tensor B in the file.
        transposed: Whether the parameter is stored as `[I, O]` (Conv1D).
        embedding: Whether the module is an embedding, for which PEFT swaps A and B.
        targeted: The parameters that `target_parameters` may mean, in any order. PEFT nests the
            wrappers of a module's parameters, in the order that the module has them.
        depth: The position of this wrapper in its nest, from the innermost.
        leaf: The name of the parameter in its module, if it is not `weight`.
        piece: The place of the change in the parameter, if the base fuses or splits the module.
    """

    module: str
    rank: int
    scale: float
    shape: tuple[int, ...]
    a: str
    b: str
    transposed: bool = False
    embedding: bool = False
    targeted: tuple[Targeted, ...] = ()
    depth: int = 0
    leaf: str = "weight"
    piece: Piece | None = None

    @property
    def parameter(self) -> str:
        """The name of the parameter that changes."""
        return f"{self.module}.{self.leaf}" if self.piece is None else self.piece.parameter


def read_adapter(config: Path, weights: Path, name: str) -> tuple[Adapted, ...]:
    """Read which modules a PEFT LoRA changes, and how.

    Args:
        config: The path of `adapter_config.json`.
        weights: The path of `adapter_model.safetensors`. Only its header is read.
        name: The name of the adapter in errors.

    Returns:
        One change per module, sorted by module. Adapters with equal headers and configurations
        share one tuple.

    Raises:
        IntegrityError: The configuration asks for more than a low-rank change. Or a tensor has no
            partner, has another rank than the configuration says, or belongs to a module that
            target_modules does not match.
    """
    text, (header, size) = read_small(config), read_header_text(weights)
    try:
        with limit_matching_time():
            return _read_adapter(text, header, size)
    except (ValueError, AttributeError, RecursionError):
        read_json(config), read_header(weights)  # Their errors name the file.
        raise
    except HubError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from None
    except (TimeoutError, re.error) as error:
        raise IntegrityError(
            f"{name}: a pattern in its configuration cannot be used: {error}",
            "simplify target_modules and the other patterns in adapter_config.json",
        ) from None


@lru_cache(maxsize=64)
def _read_adapter(config_text: bytes, header: bytes, size: int) -> tuple[Adapted, ...]:
    """Read an adapter from its bytes. The result is cached: many experts have equal shapes."""
    config = json.loads(config_text)
    check_config(config)
    return tuple(_pair_factors(config, parse_header(header, size)))


def _pair_factors(config: dict[str, Any], header: Header) -> list[Adapted]:
    """Pair the factors A and B of each module, and check them."""
    pairs: dict[str, dict[str, str]] = {}
    parts: list[DensePart] = []
    for tensor, info in header.items():
        found = FACTOR.fullmatch(tensor)
        if not found:
            # It refuses what is no dense part either.
            part = find_dense_part(config, header, tensor)
            parts += [part] if part else []
            continue
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise IntegrityError(
                f"tensor {tensor} is {info.dtype} {list(info.shape)}, "
                "and the factors of a LoRA are matrices of floats",
                "save the adapter again with peft",
            )
        module, linear, embedding = found.groups()
        pairs.setdefault(module, {})[linear or f"embedding_{embedding}"] = tensor
    check_declared_parts(config, parts)
    adapted = []
    nested = _measure_nests(pairs) if config.get("target_parameters") else {}
    for module, pair in sorted(pairs.items()):
        if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise IntegrityError(
                f"module {module} has {_name_factors(pair)} alone, and a LoRA has two factors",
                "check that the file is complete",
            )
        path, depth = nested.get(module, (module, 0))
        leaves = list_targeted_leaves(config, path)
        if not leaves and not is_targeted(config, path):
            raise IntegrityError(
                f"there are weights for {path}, which its target_modules do not match",
                "correct target_modules in adapter_config.json; peft would not load the weights",
            )
        adapted.append(_make_change(config, header, path, pair, leaves, depth))
    if not adapted:
        raise IntegrityError("the file holds no LoRA weights", "check that the file is complete")
    return adapted


def _name_factors(pair: Iterable[str]) -> str:
    """Name the tensors of a module, such as `lora_A`."""
    return ", ".join(f"lora_{key}" for key in sorted(pair))


def _measure_nests(modules: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return the module that each wrapper adapts, and its position from the innermost wrapper."""
    paths = {module: re.sub(r"(\.base_layer)+$", "", module) for module in modules}
    levels = {module: module[len(path) :].count(".") for module, path in paths.items()}
    deepest: dict[str, int] = {}
    for module, path in paths.items():
        deepest[path] = max(deepest.get(path, 0), levels[module])
    return {module: (path, deepest[path] - levels[module]) for module, path in paths.items()}


def _make_change(
    config: dict[str, Any],
    header: Header,
    module: str,
    pair: dict[str, str],
    leaves: list[str],
    depth: int,
) -> Adapted:
    """Return the change of one module after checking its rank against the configuration."""
    embedding = "embedding_A" in pair
    first, second = (
        (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
    )
    (rank, inputs), (outputs, rank_b) = header[first].shape, header[second].shape
    declared, scale = find_rank_and_scale(config, module)
    targeted = tuple(Targeted(n, *find_rank_and_scale(config, f"{module}.{n}")) for n in leaves)
    if rank != rank_b or not (rank == declared or any(rank % t.rank == 0 for t in targeted)):
        raise IntegrityError(
            f"module {module} has A of rank {rank} and B of rank {rank_b}, "
            f"and its configuration says {declared}",
            "correct r or rank_pattern in adapter_config.json",
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    turned = transposed and not embedding
    return Adapted(module, rank, scale, shape, first, second, turned, embedding, targeted, depth)


def check_gates(gates: dict[str, tuple[int, ...]], adapted: Iterable[Adapted], name: str) -> None:
    """Check gates against the adapter that they belong to.

    Args:
        gates: The shape of the gate of each module.
        adapted: The adapter's changes.
        name: The name of the expert in errors.

    Raises:
        HubError: A gate belongs to a module that is not adapted, or its shape is not `[I]`.
    """
    widths = {a.module: a.shape[0] if a.transposed else a.shape[1] for a in adapted}
    for module, shape in sorted(gates.items()):
        if shape != (widths.get(module),):
            raise HubError(
                f"{name} has a gate {list(shape)} for {module}, which "
                + (f"has {widths[module]} inputs" if module in widths else "is not adapted"),
                "train the gates again",
            )


def read_gates(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the gates in a file. Only its header is read.

    Args:
        path: The path of `phatgoose_gates.safetensors`.

    Returns:
        The shape of the gate of each module. Files with equal headers share one mapping.

    Raises:
        IntegrityError: The file holds other tensors.
    """
    try:
        return _read_gates(*read_header_text(path))
    except ValueError:
        read_header(path)  # Its error names the file.
        raise
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error.message}", error.hint) from None


@lru_cache(maxsize=64)
def _read_gates(header: bytes, size: int) -> dict[str, tuple[int, ...]]:
    """Read gates from the bytes of a header. The result is cached."""
    gates: dict[str, tuple[int, ...]] = {}
    for tensor, info in parse_header(header, size).items():
        if not tensor.endswith(".gate") or info.dtype not in FLOATS or len(info.shape) != 1:
            raise IntegrityError(
                f"tensor {tensor} is not a gate, a vector of floats", "train the gates again"
            )
        gates[tensor.removesuffix(".gate")] = info.shape
    return gates
