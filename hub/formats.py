"""PEFT folders and task vectors, read exactly or refused by name.

Everything here reads headers and JSON; tensors are loaded by the composition alone.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experthub.hub._yaml import did_you_mean
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.header import FLOATS, TensorInfo, read_header

PREFIX = "base_model.model."
# Keys of a LoRA configuration that change nothing, or whose meaning is honoured below.
HONOURED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "ensure_weight_tying",
}
# Keys that change the function, with the values under which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
PLAIN_INITS = (True, False, "gaussian", "orthogonal", None)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; IntegrityError when the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}", "get it again from its source"
        ) from None
    if not isinstance(value, dict):
        raise IntegrityError(
            f"{path} is damaged: not a JSON object", "get it again from its source"
        )
    return value


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse, by name, whatever would silently change the function that the adapter computes."""
    if config.get("peft_type") != "LORA":
        raise IntegrityError(
            f"{name}: peft_type is {config.get('peft_type')!r}", "only LORA adapters are experts"
        )
    for key, value in config.items():
        if key in REFUSED:
            if value not in REFUSED[key]:
                raise IntegrityError(
                    f"{name}: {key} is {value!r}, which is more than a low-rank change",
                    "merge the adapter with peft and store it as a task vector",
                )
        elif key not in HONOURED | HARMLESS:
            raise IntegrityError(
                f"{name}: unknown key {key!r} in its configuration",
                did_you_mean(key, HONOURED | set(REFUSED)),
            )
    if config.get("init_lora_weights") not in PLAIN_INITS:
        raise IntegrityError(
            f"{name}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base",
            "save it with peft's path_initial_model_for_weight_conversion",
        )
    if config.get("ensure_weight_tying"):
        raise IntegrityError(f"{name}: ensure_weight_tying is set", "train without it")
    for key, kinds in {"r": int, "lora_alpha": (int, float)}.items():
        value = config.get(key, 8)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1e6:  # type: ignore[arg-type]
            raise IntegrityError(f"{name}: {key} is {value!r}", "a positive number is meant")


def read_adapter(config: dict[str, Any], header: dict[str, TensorInfo], name: str) -> list[Adapted]:
    """What a PEFT LoRA changes, module by module, sorted by module.

    config, header: of the adapter, the former checked by `check_config`.  Raises IntegrityError
    for tensors without a partner, of the wrong rank, or that the configuration does not target.
    """
    pairs: dict[str, dict[str, str]] = {}
    for tensor, info in header.items():
        found = re.fullmatch(
            rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", tensor
        )
        if not found:
            raise IntegrityError(
                f"{name}: tensor {tensor!r} is not a part of a plain LoRA",
                "DoRA, bias and saved modules are refused: they are more than a low-rank change",
            )
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise IntegrityError(f"{name}: tensor {tensor} is {info.dtype} {list(info.shape)}")
        module, linear, embedding = found.groups()
        pairs.setdefault(module, {})[linear or f"embedding_{embedding}"] = tensor
    adapted = []
    for module, pair in sorted(pairs.items()):
        if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise IntegrityError(f"{name}: module {module} has {sorted(pair)} and no partner")
        if not targeted(config, module):
            raise IntegrityError(
                f"{name}: has weights for {module}, which its target_modules do not match",
                "peft would not load them either; correct the configuration",
            )
        adapted.append(_adapted(config, header, name, module, pair))
    if not adapted:
        raise IntegrityError(f"{name}: holds no LoRA weights", "is the file complete?")
    return adapted


def _adapted(
    config: dict[str, Any],
    header: dict[str, TensorInfo],
    name: str,
    module: str,
    pair: dict[str, str],
) -> Adapted:
    embedding = "embedding_A" in pair
    first, second = (
        (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
    )
    (rank, inputs), (outputs, rank_b) = header[first].shape, header[second].shape
    declared = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if rank != rank_b or rank != declared:
        raise IntegrityError(
            f"{name}: module {module} has A of rank {rank} and B of rank {rank_b}, "
            f"and its configuration says {declared}"
        )
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    return Adapted(
        module, rank, scale, shape, first, second, transposed and not embedding, embedding
    )


def _pattern(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def targeted(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT's target_modules, exclude_modules and layers_to_transform choose the module."""
    exclude = config.get("exclude_modules")
    if exclude and _named(exclude, module):
        return False
    target = config.get("target_modules")
    if target is None or target == "all-linear":
        return True
    if not _named(target, module):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or isinstance(target, str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]+"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf".*\.{pattern}\.(\d+)\.", module)
        if found:
            return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(target: Any, module: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)


def check_shapes(
    adapted: list[Adapted], base: dict[str, tuple[int, ...]], name: str, base_name: str
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


def kind_of(folder: Path) -> Literal["lora", "task_vector"]:
    """Which kind of expert a folder holds; IntegrityError when it is none, or only a pickle."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_model.safetensors" in names:
        return "lora"
    if "task_vector.safetensors" in names:
        return "task_vector"
    pickles = sorted(n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise IntegrityError(
            f"{folder} holds {pickles[0]}, a pickle, and no safetensors",
            "save it again with safe_serialization=True; pickles can run code when read",
        )
    raise IntegrityError(
        f"{folder} holds no adapter_model.safetensors and no task_vector.safetensors",
        "name the folder that peft's save_pretrained wrote",
    )


def read_gates(path: Path) -> dict[str, tuple[int, ...]]:
    """Module -> shape of the gates in a file; IntegrityError for anything else in it."""
    gates: dict[str, tuple[int, ...]] = {}
    for tensor, info in read_header(path).items():
        if not tensor.endswith(".gate") or info.dtype not in FLOATS or len(info.shape) != 1:
            raise IntegrityError(f"{path}: tensor {tensor} is not a gate [d_in]")
        gates[tensor.removesuffix(".gate")] = info.shape
    return gates
