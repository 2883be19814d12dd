"""X-LoRA: a small classifier reads the base's last hidden states and weighs the experts for every token.

Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", https://arxiv.org/abs/2402.07148,
section 2.1.  Each token is read twice, first by the base without experts; both passes have their
own key/value cache here, where the authors' code has none.  The outputs of the experts are
weighted, which equals their weighted inputs.

Shapes: B rows, S tokens, H hidden features, L layers of the recipe's modules, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from experthub.merge import Range, Routing
from experthub.routing._methods import routers
from experthub.routing._pool import Pool, Select
from experthub.routing._router import Weights
from torch import Tensor, nn


@routers.register(
    paper="https://arxiv.org/abs/2402.07148",
    needs=("data", "hidden"),
    learns=True,
    labelled=lambda options: True,
    routing=Routing("token", "model", zero_shot=False),
)
def xlora(
    pool: Pool,
    *,
    depth: Annotated[int, Range(1, 16)] = 1,
    size: Annotated[int, Range(1)] = 2048,
    layerwise: bool = True,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    top_k: Annotated[int | None, Range(1)] = None,
    steps: Annotated[int, Range(1)] = 100,
    lr: Annotated[float, Range(0)] = 1e-3,
    batch_size: Annotated[int, Range(1)] = 8,
    seed: int = 0,
) -> Select:
    """Token-wise weights of all experts, by a classifier of the base's last hidden state.

    The classifier is trained on the recipe's data, with base and experts frozen.

    depth: linear layers of the classifier, with ReLU between; 1 as in peft.  size: of its hidden
    layers.  layerwise: weights for each layer of the model, or one for all.  temperature: of the
    softmax.  top_k: keep only the largest weights, as they are; None keeps all.  steps, lr,
    batch_size: of training by AdamW.  seed: of the classifier's start and of the batches' order.
    """
    weights = [pool.state[f"classifier.{i}.weight"] for i in range(depth)]
    biases = [pool.state[f"classifier.{i}.bias"] for i in range(depth)]

    def select(hidden_BSH: Tensor) -> Weights:
        x = hidden_BSH.float()
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = nn.functional.linear(x.relu() if i else x, weight, bias)
        by_layer_BSLE = x.view(*x.shape[:-1], -1, pool.n_experts)
        w_BSLE = (by_layer_BSLE / temperature).softmax(-1)
        if top_k is not None and top_k < pool.n_experts:
            least = w_BSLE.topk(top_k, dim=-1).values[..., -1:]
            w_BSLE = w_BSLE * (w_BSLE >= least)
        return Weights(w_BSLE)

    return select


def untrained_classifier(
    n_features: int, n_layers: int, n_experts: int, options: Mapping[str, object], seed: int
) -> dict[str, Tensor]:
    """The state of `xlora` before training: small random weights, biases of zero."""
    depth, size = int(str(options["depth"])), int(str(options["size"]))
    outputs = n_experts * (n_layers if options["layerwise"] else 1)
    widths = [n_features, *[size] * (depth - 1), outputs]
    random = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(depth):
        scale = widths[i] ** -0.5
        weight = torch.randn(widths[i + 1], widths[i], generator=random) * scale
        state[f"classifier.{i}.weight"] = weight
        state[f"classifier.{i}.bias"] = torch.zeros(widths[i + 1])
    return state
