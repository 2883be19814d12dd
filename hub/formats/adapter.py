"""LoRA adapters in PEFT's format, and gates: read exactly, or refused with the reason.

Only headers and JSON are read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.json_files import read_json, read_small
from experthub.hub.files.patterns import limit_matching_time
from experthub.hub.files.spelling import suggest_name
from experthub.hub.formats.lora_config import by_pattern, check_config, targeted
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    header_text,
    parsed,
    read_header,
)

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapted:
    """The low-rank change `scale * B A` of one module's parameter `<module>.weight`.

    Args:
        module: The module's name.
        rank: The rank of A and B.
        scale: The factor of the change.
        shape: The parameter's shape.
        a: The name of the tensor A in the file.
        b: The name of the tensor B in the file.
        transposed: Whether the parameter is stored `[I, O]` (Conv1D).
        embedding: Whether A and B swap roles, as PEFT stores those of embeddings.
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
        config: `adapter_config.json`.
        weights: `adapter_model.safetensors`; only its header is read.
        name: What errors call the adapter.

    Returns:
        One change per module, sorted by module. Adapters with equal headers and configurations
        get the same tuple.

    Raises:
        IntegrityError: The configuration asks for more than a low-rank change, or a tensor has no
            partner, another rank, or is not targeted by the configuration.
    """
    text, (header, size) = read_small(config), header_text(weights)
    try:
        with limit_matching_time():
            return _read_adapter(text, header, size)
    except (ValueError, AttributeError, RecursionError):
        read_json(config), read_header(weights)  # for their errors, which name the file
        raise
    except HubError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from None
    except (TimeoutError, re.error) as error:
        raise IntegrityError(
            f"{name}: a pattern in its configuration cannot be used: {error}",
            "simplify target_modules and the like",
        ) from None


@lru_cache(maxsize=64)
def _read_adapter(config_text: bytes, header: bytes, size: int) -> tuple[Adapted, ...]:
    """Read an adapter from its content, cached: many experts have few different shapes."""
    config = json.loads(config_text)
    check_config(config)
    return tuple(_adapters(config, parsed(header, size)))


def _adapters(config: dict[str, Any], header: Header) -> list[Adapted]:
    """Pair the tensors A and B of each module, and check them."""
    pairs: dict[str, dict[str, str]] = {}
    for tensor, info in header.items():
        found = re.fullmatch(
            rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", tensor
        )
        if not found:
            raise IntegrityError(
                f"tensor {tensor!r} is not a part of a plain LoRA",
                "DoRA, bias and saved modules are refused: they are more than a low-rank change",
            )
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise IntegrityError(
                f"tensor {tensor} is {info.dtype} {list(info.shape)}",
                "a LoRA's factors are matrices of floats",
            )
        module, linear, embedding = found.groups()
        pairs.setdefault(module, {})[linear or f"embedding_{embedding}"] = tensor
    adapted = []
    for module, pair in sorted(pairs.items()):
        if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise IntegrityError(
                f"module {module} has {sorted(pair)} and no partner",
                "is the file complete?",
            )
        if not targeted(config, module):
            raise IntegrityError(
                f"has weights for {module}, which its target_modules do not match",
                "peft would not load them either; correct the configuration",
            )
        adapted.append(_adapted(config, header, module, pair))
    if not adapted:
        raise IntegrityError("holds no LoRA weights", "is the file complete?")
    return adapted


def _adapted(
    config: dict[str, Any],
    header: Header,
    module: str,
    pair: dict[str, str],
) -> Adapted:
    """Return the change of one module, its rank and scale checked against the configuration."""
    embedding = "embedding_A" in pair
    first, second = (
        (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
    )
    (rank, inputs), (outputs, rank_b) = header[first].shape, header[second].shape
    declared = by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if rank != rank_b or rank != declared:
        raise IntegrityError(
            f"module {module} has A of rank {rank} and B of rank {rank_b}, "
            f"and its configuration says {declared}",
            "correct r or rank_pattern in adapter_config.json",
        )
    alpha = by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
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
        base: Parameter name -> shape, of the base.
        name: What errors call the expert.
        base_name: What errors call the base.

    Raises:
        HubError: The base lacks a module, or its weight has another shape.
    """
    for change in adapted:
        shape = base.get(f"{change.module}.weight")
        if shape is None:
            raise HubError(
                f"{name}: adapts {change.module}, which {base_name} does not have",
                suggest_name(change.module, [n.removesuffix(".weight") for n in base]),
            )
        if tuple(shape) != change.shape:
            raise HubError(
                f"{name}: changes {change.module} by {list(change.shape)}, "
                f"where {base_name} has {list(shape)}",
                "the expert was trained on another base",
            )


def check_gates(gates: dict[str, tuple[int, ...]], adapted: Iterable[Adapted], name: str) -> None:
    """Check gates against the adapter that they belong to.

    Args:
        gates: Module -> shape of its gate.
        adapted: The adapter's changes.
        name: What errors call the expert.

    Raises:
        HubError: A gate belongs to a module that is not adapted, or is not `[inputs]`.
    """
    widths = {a.module: a.shape[0] if a.transposed else a.shape[1] for a in adapted}
    for module, shape in sorted(gates.items()):
        if shape != (widths.get(module),):
            raise HubError(
                f"{name}: a gate {list(shape)} for {module}, "
                + (f"which has {widths[module]} inputs" if module in widths else "not adapted"),
                "train the gates again",
            )


def read_gates(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the gates in a file; only its header is read.

    Args:
        path: `phatgoose_gates.safetensors`.

    Returns:
        Module -> shape of its gate. Files with equal headers get the same mapping.

    Raises:
        IntegrityError: The file holds anything else.
    """
    try:
        return _read_gates(*header_text(path))
    except ValueError:
        read_header(path)  # for its error, which names the file
        raise
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error.message}", error.hint) from None


@lru_cache(maxsize=64)
def _read_gates(header: bytes, size: int) -> dict[str, tuple[int, ...]]:
    """Read gates from the header's content, cached."""
    gates: dict[str, tuple[int, ...]] = {}
    for tensor, info in parsed(header, size).items():
        if not tensor.endswith(".gate") or info.dtype not in FLOATS or len(info.shape) != 1:
            raise IntegrityError(f"tensor {tensor} is not a gate [d_in]", "train the gates again")
        gates[tensor.removesuffix(".gate")] = info.shape
    return gates
