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

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.json_files import read_json, read_small
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.formats.dense_parts import FACTOR, find_dense_part, find_scale
from experthub.hub.formats.lora_config import check_config, is_targeted, match_pattern
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
class Adapted:
    """The low-rank change `scale * B A` of the parameter `<module>.weight`.

    Args:
        module: The path of the module.
        rank: The rank R of A and B.
        scale: The factor of the change.
        shape: The shape of the parameter.
        a: The name of the tensor A in the file.
        b: The name of the tensor B in the file.
        transposed: Whether the parameter is stored as `[I, O]` (Conv1D).
        embedding: Whether the module is an embedding, for which PEFT swaps A and B.
    """

    module: str
    rank: int
    scale: float
    shape: tuple[int, int]
    a: str
    b: str
    transposed: bool = False
    embedding: bool = False


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
    for tensor, info in header.items():
        found = FACTOR.fullmatch(tensor)
        if not found:
            find_dense_part(config, header, tensor)  # It refuses what is no dense part either.
            continue
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise IntegrityError(
                f"tensor {tensor} is {info.dtype} {list(info.shape)}, "
                "and the factors of a LoRA are matrices of floats",
                "save the adapter again with peft",
            )
        module, linear, embedding = found.groups()
        pairs.setdefault(module, {})[linear or f"embedding_{embedding}"] = tensor
    adapted = []
    for module, pair in sorted(pairs.items()):
        if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise IntegrityError(
                f"module {module} has {sorted(pair)} and no partner",
                "check that the file is complete",
            )
        if not is_targeted(config, module):
            raise IntegrityError(
                f"there are weights for {module}, which its target_modules do not match",
                "correct target_modules in adapter_config.json; peft would not load the weights",
            )
        adapted.append(_make_change(config, header, module, pair))
    if not adapted:
        raise IntegrityError("the file holds no LoRA weights", "check that the file is complete")
    return adapted


def _make_change(
    config: dict[str, Any],
    header: Header,
    module: str,
    pair: dict[str, str],
) -> Adapted:
    """Return the change of one module after checking its rank against the configuration."""
    embedding = "embedding_A" in pair
    first, second = (
        (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
    )
    (rank, inputs), (outputs, rank_b) = header[first].shape, header[second].shape
    declared = match_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if rank != rank_b or rank != declared:
        raise IntegrityError(
            f"module {module} has A of rank {rank} and B of rank {rank_b}, "
            f"and its configuration says {declared}",
            "correct r or rank_pattern in adapter_config.json",
        )
    scale = find_scale(config, module)
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    return Adapted(
        module, rank, scale, shape, first, second, transposed and not embedding, embedding
    )


def check_shapes(
    adapted: Iterable[Adapted], base: dict[str, tuple[int, ...]], name: str, base_name: str
) -> None:
    """Check low-rank changes against a base.

    Args:
        adapted: The changes.
        base: The shape of each parameter of the base.
        name: The name of the expert in errors.
        base_name: The name of the base in errors.

    Raises:
        HubError: The base lacks a module, or its weight has another shape.
    """
    for change in adapted:
        shape = base.get(f"{change.module}.weight")
        if shape is None:
            raise HubError(
                f"{name} adapts {change.module}, which {base_name} does not have",
                "use the base that the expert was trained on",
            )
        if tuple(shape) != change.shape:
            raise HubError(
                f"{name} changes {change.module} by {list(change.shape)}, "
                f"but {base_name} has {list(shape)}",
                "use the base that the expert was trained on",
            )


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
