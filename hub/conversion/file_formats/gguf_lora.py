"""LoRA adapters of llama.cpp: GGUF files with the names, and partly the rows, of GGUF models."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from experthub.hub.conversion.base_weights import StoredBase
from experthub.hub.conversion.foreign_adapter import ForeignAdapter, LazyTensors, sort_patterns
from experthub.hub.conversion.found_adapter import FoundAdapter
from experthub.hub.errors import IntegrityError
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.dense_parts import PREFIX
from experthub.hub.formats.gguf_header import check_gguf
from torch import Tensor

HINT = "convert the adapter's original, which peft saved"
# Architectures whose rows of q and k are reordered for the other form of rotary embeddings.
PERMUTED = {"llama", "granite"}
# Architectures whose linear weights are stored as transformers stores them.
AS_STORED = {
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "stablelm",
    "starcoder2",
}
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
FACTOR_NAME = re.compile(r"(.+)\.weight\.lora_([ab])")


def read(found: FoundAdapter, base: StoredBase | None) -> ForeignAdapter:
    """Read a LoRA of llama.cpp.

    The change is `alpha / r * b a`, or `b a` if alpha is 0.

    Args:
        found: The adapter.
        base: The base, whose modules the names are compared with.

    Returns:
        The adapter in peft's form.

    Raises:
        IntegrityError: The file is no LoRA, or its architecture stores weights in an unknown form.
    """
    import gguf

    check_gguf(found.weights)
    file = gguf.GGUFReader(found.weights)
    fields = {name: field.contents() for name, field in file.fields.items()}
    architecture = str(fields.get("general.architecture"))
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise IntegrityError(
            f"{found.weights} is no adapter: general.type is {fields.get('general.type')!r}",
            "name a GGUF file of an adapter; a GGUF model is a base",
        )
    if fields.get("adapter.alora.invocation_tokens"):
        raise IntegrityError(
            f"{found.weights} acts only after certain tokens, which no change of the weights does",
            "train the adapter again as a plain LoRA",
        )
    if architecture not in PERMUTED | AS_STORED:
        raise IntegrityError(
            f"{found.weights}: the hub does not know how {architecture[:60]!r} orders its weights",
            HINT,
        )
    if base is None:
        raise IntegrityError(f"{found.weights} needs its base", "use --base")
    modules = _list_modules(base, architecture)
    heads = _count_heads(base) if architecture in PERMUTED else {}
    tensors: dict[str, Callable[[], Tensor]] = {}
    ranks = {}
    for tensor in file.tensors:
        match = FACTOR_NAME.fullmatch(str(tensor.name))
        path = modules.get(match[1]) if match else None
        if match is None or path is None:
            raise IntegrityError(
                f"{found.weights}: {tensor.name!s:.200} is no LoRA of a module of {base.base.name}",
                "use the base that the adapter was trained on, or " + HINT,
            )
        values = _dequantise(tensor)
        if match[1] == "token_embd":
            name = f"lora_embedding_{match[2].upper()}"
            values = values.T if match[2] == "a" else values
        else:
            name = f"lora_{match[2].upper()}.weight"
            if match[2] == "b":
                values = _undo_permutation(values, heads.get(path.rpartition(".")[2]))
        if match[2] == "a":
            ranks[path] = int(values.shape[0])
        tensors[f"{PREFIX}{path}.{name}"] = partial(torch.Tensor.contiguous, values)
    alpha = float(fields.get("adapter.lora.alpha") or 0)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": max(ranks.values(), default=1),
        "lora_alpha": alpha or float(max(ranks.values(), default=1)),
        "rank_pattern": sort_patterns(ranks),
        "alpha_pattern": sort_patterns({p: alpha or float(rank) for p, rank in ranks.items()}),
        "target_modules": sorted(ranks),
        "base_model_name_or_path": base.base.name,
    }
    return ForeignAdapter(str(found.weights), config, LazyTensors(tensors))


def _list_modules(base: StoredBase, architecture: str) -> dict[str, str]:
    """Map the names of GGUF to the modules of the base."""
    import gguf

    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = [int(m[1]) for m in map(LAYER.match, base.base.shapes) if m]
    names = gguf.get_tensor_name_map(kind, max(layers, default=0) + 1)
    found = {}
    for parameter in base.base.shapes:
        own = (
            names.get_name(parameter, try_suffixes=(".weight",)) if ".weight" in parameter else None
        )
        if own:
            found[own.removesuffix(".weight")] = parameter.removesuffix(".weight")
    return found


def _count_heads(base: StoredBase) -> dict[str, int]:
    """Return the number of heads of the modules whose rows are reordered."""
    config = read_json(base.base.folder / "config.json")
    count = int(config["num_attention_heads"])
    return {"q_proj": count, "k_proj": int(config.get("num_key_value_heads") or count)}


def _undo_permutation(rows: Tensor, heads: int | None) -> Tensor:
    """Bring rows that are ordered by halves of pairs back into the order of transformers."""
    if heads is None:
        return rows
    return rows.view(heads, len(rows) // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def _dequantise(tensor: Any) -> Tensor:
    """Return the values of a tensor in float32, or as it is stored in a float dtype."""
    import gguf

    if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
        return torch.tensor(tensor.data)
    return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
