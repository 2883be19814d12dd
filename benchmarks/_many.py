"""Create many experts for a benchmark: pairs of the starter experts with added noise.

Two experts of rank 4 are stacked into one of rank 8. Every weight gets normal noise of half the
standard deviation of its tensor. Every gate gets noise of its own standard deviation. The number
of the expert is the seed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _bench import BASE, LINEARS
from experthub.hub import Store
from safetensors.torch import load_file, save_file
from torch import Tensor

NOISE, GATE_NOISE = 0.5, 1.0  # relative to the standard deviation of a tensor
RANK = 8
REAL = Path(__file__).parent.parent / "examples" / "experts"
NAMES = Path(__file__).parent.parent / "examples" / "demo" / "experts.txt"


def many(folder: Path, count: int) -> tuple[Store, Path]:
    """Create a store with experts and a registry that names them, unless they exist.

    Args:
        folder: The folder for the store and the registry.
        count: The number of experts.

    Returns:
        The store, and the path of the registry.
    """
    store, registry = Store(folder / "store"), folder / f"registry-{count}.yaml"
    if registry.is_file():
        return store, registry
    real = [_real(name) for name in NAMES.read_text().split()]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(count):
        name = f"expert-{number}"
        with TemporaryDirectory(dir=folder) as place:
            _write(Path(place), number, real)
            digest, _ = store.add(Path(place))
        entry = {"name": name, "base": BASE, "sources": [f"file:{folder}"], "digest": digest}
        entries.append(entry)
        if number % 64 == 63:
            print(f"created {number + 1} of {count} experts", file=sys.stderr)
    registry.write_text(json.dumps({"version": 1, "experts": entries}))  # JSON is valid YAML
    return store, registry


def _real(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load the weights of a starter expert, with its scale multiplied into B, and its gates."""
    folder = REAL / name
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    weights = load_file(folder / "adapter_model.safetensors")
    scaled = {n: t.float() * (scale if ".lora_B." in n else 1) for n, t in weights.items()}
    return scaled, load_file(folder / "phatgoose_gates.safetensors")


def _write(
    place: Path, number: int, real: list[tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> None:
    """Write the expert of a number as an adapter folder."""
    random = torch.Generator().manual_seed(number)
    one, two = real[number % len(real)], real[number // len(real) % len(real)]

    def noisy(tensor: Tensor, noise: float) -> Tensor:
        return tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=random)

    weights = {
        name: noisy(torch.cat([t, two[0][name]], int(".lora_B." in name)), NOISE).bfloat16()
        for name, t in one[0].items()
    }
    gates = {name: noisy(gate.float(), GATE_NOISE) for name, gate in one[1].items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    config |= {"target_modules": list(LINEARS), "bias": "none", "inference_mode": True}
    save_file(weights, place / "adapter_model.safetensors")
    save_file(gates, place / "phatgoose_gates.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(config))
