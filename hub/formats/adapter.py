"""PEFT folders and task vectors, read exactly or refused by name.

Everything here reads headers and JSON; tensors are loaded by the composition alone.
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
from experthub.hub.files.patterns import matching
from experthub.hub.files.yaml_files import did_you_mean
from experthub.hub.formats.lora_config import by_pattern, check_config, targeted
from experthub.hub.formats.safetensors_header import (
    FLOATS,
    Header,
    header_text,
    parsed,
    read_header,
)
from experthub.hub.registry.expert import (
    ADAPTER,
    COEFFICIENTS,
    ROUTER,
    SHARD_INDEX,
    SKILLS,
    TASK_VECTOR,
    Kind,
)

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapted:
    """How one module is changed: `scale * B A`, of the parameter `<module>.weight`.

    shape: of that parameter.  a, b: tensor names in the adapter's file.  transposed: the
    parameter is stored `[I, O]` (Conv1D).  embedding: A and B swap roles, as PEFT stores them.
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
    """What a PEFT LoRA changes, module by module, sorted by module.

    config, weights: the adapter's files.  name: what errors call it.  Raises IntegrityError for a
    configuration that asks for more than a low-rank change, and for tensors without a partner, of
    the wrong rank, or that the configuration does not target.
    """
    text, (header, size) = read_small(config), header_text(weights)
    try:
        with matching():
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
    """Remembered by content: a hub's experts are many, and their shapes few."""
    config = json.loads(config_text)
    check_config(config)
    return tuple(_adapters(config, parsed(header, size)))


def _adapters(config: dict[str, Any], header: Header) -> list[Adapted]:
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
    """Raise HubError for the first module that the base lacks or whose shape does not fit.

    base: parameter name -> shape.
    """
    for change in adapted:
        shape = base.get(f"{change.module}.weight")
        if shape is None:
            raise HubError(
                f"{name}: adapts {change.module}, which {base_name} does not have",
                did_you_mean(change.module, [n.removesuffix(".weight") for n in base]),
            )
        if tuple(shape) != change.shape:
            raise HubError(
                f"{name}: changes {change.module} by {list(change.shape)}, "
                f"where {base_name} has {list(shape)}",
                "the expert was trained on another base",
            )


def check_gates(gates: dict[str, tuple[int, ...]], adapted: Iterable[Adapted], name: str) -> None:
    """Raise HubError for a gate of a module that is not adapted, or of another width than its input."""
    widths = {a.module: a.shape[0] if a.transposed else a.shape[1] for a in adapted}
    for module, shape in sorted(gates.items()):
        if shape != (widths.get(module),):
            raise HubError(
                f"{name}: a gate {list(shape)} for {module}, "
                + (f"which has {widths[module]} inputs" if module in widths else "not adapted"),
                "train the gates again",
            )


def kind_of(folder: Path) -> Kind:
    """Which kind of expert a folder holds; IntegrityError when it is none, or only a pickle."""
    names = {path.name for path in folder.iterdir()}
    if ADAPTER in names:
        return "lora"
    if names & {TASK_VECTOR, SHARD_INDEX}:
        return "task_vector"
    if COEFFICIENTS in names:
        return "coefficients"
    if SKILLS in names:
        return "skills"
    if ROUTER in names:
        return "router"
    pickles = sorted(n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise IntegrityError(
            f"{folder} holds {pickles[0]}, a pickle, and no safetensors",
            "save it again with safe_serialization=True; pickles can run code when read",
        )
    raise IntegrityError(
        f"{folder} holds no {ADAPTER} and no {TASK_VECTOR}",
        "name the folder that peft's save_pretrained wrote",
    )


def read_gates(path: Path) -> dict[str, tuple[int, ...]]:
    """Module -> shape of the gates in a file; IntegrityError for anything else in it."""
    try:
        return _read_gates(*header_text(path))
    except ValueError:
        read_header(path)  # for its error, which names the file
        raise
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error.message}", error.hint) from None


@lru_cache(maxsize=64)
def _read_gates(header: bytes, size: int) -> dict[str, tuple[int, ...]]:
    gates: dict[str, tuple[int, ...]] = {}
    for tensor, info in parsed(header, size).items():
        if not tensor.endswith(".gate") or info.dtype not in FLOATS or len(info.shape) != 1:
            raise IntegrityError(f"tensor {tensor} is not a gate [d_in]", "train the gates again")
        gates[tensor.removesuffix(".gate")] = info.shape
    return gates
