"""Make an adapter with mlx-lm, and save mlx's logits with it; run by the interpreter of that peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(base: Path, folder: Path, kind: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    mx.random.seed(1)
    parameters = {"rank": 3, "scale": 1.7, "dropout": 0.0}
    if kind == "embedding":
        parameters["keys"] = ["self_attn.q_proj", "model.embed_tokens"]
    model, _ = load_model(base)
    model.freeze()
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")

    def shake(value: Any) -> Any:
        return value + 0.2 * mx.random.normal(value.shape)

    trained = tree_map(shake, model.trainable_parameters())
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(trained)))
    config = {
        "model": str(base),
        "fine_tune_type": "dora" if kind == "dora" else "lora",
        "num_layers": 2,
        "lora_parameters": parameters,
        "learning_rate": 1e-5,
        "train": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model, _ = load_model(base)
    model = load_adapters(model, str(folder))
    model.eval()
    logits = model(mx.array([list(range(4, 20))])).astype(mx.float32)
    mx.save_safetensors(str(folder.parent / "logits.safetensors"), {"logits": logits})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
