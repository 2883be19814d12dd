"""X-LoRA: a small classifier reads the base's last hidden states and weights the experts per token.

Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", https://arxiv.org/abs/2402.07148,
section 2.1. Each token is read twice: first by the base without experts, then by the routed model.
Both passes have a key/value cache here; the authors' code has none. The outputs of the experts are
weighted, which equals weighting their inputs.

Shapes: B rows, S tokens, H hidden features, L layers of the recipe's modules, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
from experthub.merge import InputsPerStep, MethodFailure, Options, Range, RecipeSeed, ShapesState
from experthub.routing._pool import Batch, Pool, RouterMaterials, Select, State
from experthub.routing._router import Weights
from experthub.routing._routers import Routing, routers
from experthub.routing._state import StateError, read_tensor
from torch import Tensor, nn


def _start_classifier(materials: RouterMaterials, options: Options) -> dict[str, Tensor]:
    """Make the classifier before training: small random weights, biases of zero."""
    depth, layerwise = options["depth"], options["layerwise"]
    outputs = len(materials.labels) * (materials.n_layers if layerwise else 1)
    widths = [materials.n_features, *[options["size"]] * (depth - 1), outputs]
    random = torch.Generator().manual_seed(options["seed"])
    state = {}
    for i in range(depth):
        scale = widths[i] ** -0.5
        weight = torch.randn(widths[i + 1], widths[i], generator=random) * scale
        state[f"classifier.{i}.weight"] = weight
        state[f"classifier.{i}.bias"] = torch.zeros(widths[i + 1])
    return state


def _train(materials: RouterMaterials, options: Options) -> State:
    """Train the classifier on the recipe's data by AdamW; the base and the experts are frozen."""
    start = _start_classifier(materials, options)
    tensors = {name: materials.place(t).requires_grad_() for name, t in start.items()}
    data = materials.compose(tensors)
    labels = data.labels or ()
    optimizer = torch.optim.AdamW(tensors.values(), lr=options["lr"])
    places = [(task, row) for task, size in enumerate(data.sizes) for row in range(size)]
    random = torch.Generator().manual_seed(options["seed"])
    history = []
    for step in range(options["steps"]):
        picked = torch.randint(len(places), (options["batch_size"],), generator=random).tolist()
        rows = [[places[i][1] for i in picked if places[i][0] == t] for t in range(len(labels))]
        with torch.enable_grad():
            logits = data.logits([torch.tensor(own, dtype=torch.long) for own in rows])
            losses = [
                nn.functional.cross_entropy(found, labels[t][own], reduction="sum")
                for t, (found, own) in enumerate(zip(logits, rows, strict=True))
                if own
            ]
            loss = torch.stack(losses).sum() / len(picked)
        if not bool(torch.isfinite(loss)):
            raise MethodFailure(f"the loss is {loss.item()} at step {step + 1}", "set a lower lr")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(loss.item())
        materials.report("training the router", step + 1, options["steps"])
    return State({n: t.detach().cpu() for n, t in tensors.items()}, history=history)


def _read_classifier(pool: Pool, depth: int, layerwise: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Read the weights and the biases of the classifier's linear layers, and check them."""
    weights, biases = [], []
    for i in range(depth):
        weights.append(read_tensor(pool.state, f"classifier.{i}.weight", None, None))
        biases.append(read_tensor(pool.state, f"classifier.{i}.bias", len(weights[-1])))
    found, layers = len(biases[-1]), pool.n_layers if layerwise else 1
    outputs = pool.n_experts * (found // pool.n_experts if layers is None else layers)
    if found != outputs or not found:
        raise StateError(f"the classifier has {found} outputs, expected {outputs}")
    return weights, biases


@routers.register(
    paper="https://arxiv.org/abs/2402.07148",
    needs=("data", "hidden"),
    prepare=_train,
    needs_labels=lambda options: True,
    routing=Routing("token", "model", zero_shot=False),
)
def xlora(
    pool: Pool,
    *,
    depth: Annotated[int, Range(1, 16), ShapesState] = 1,
    size: Annotated[int, Range(1), ShapesState] = 2048,
    layerwise: Annotated[bool, ShapesState] = True,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    top_k: Annotated[int | None, Range(1)] = None,
    steps: Annotated[int, Range(1)] = 100,
    lr: Annotated[float, Range(0)] = 1e-3,
    batch_size: Annotated[int, Range(1), InputsPerStep] = 8,
    seed: Annotated[int, RecipeSeed] = 0,
) -> Select:
    """Weight all experts per token, by a classifier of the base's last hidden state.

    The classifier is trained on the recipe's data, with the base and the experts frozen.

    Args:
        pool: The experts, with the classifier as state.
        depth: Linear layers of the classifier, with ReLU between them; 1 as in peft.
        size: The width of the classifier's hidden layers.
        layerwise: Give each layer of the model its own weights.
        temperature: The temperature of the softmax.
        top_k: The number of largest weights that are kept; they are not rescaled. null keeps all.
        steps: Training steps of AdamW.
        lr: The learning rate of AdamW.
        batch_size: Examples per training step.
        seed: The seed of the classifier's initialisation and of the order of examples.

    Returns:
        A function from rows to weights `[B, S, L, E]`.
    """
    weights, biases = _read_classifier(pool, depth, layerwise)

    def select(batch: Batch) -> Weights:
        x = batch.hidden.float()
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if weight.shape[1] != x.shape[-1]:
                raise StateError(
                    f"layer {i} of the classifier reads {weight.shape[1]} features, "
                    f"found {x.shape[-1]}"
                )
            x = nn.functional.linear(x.relu() if i else x, weight, bias)
        by_layer_BSLE = x.view(*x.shape[:-1], -1, pool.n_experts)
        w_BSLE = (by_layer_BSLE / temperature).softmax(-1)
        if top_k is not None and top_k < pool.n_experts:
            least = w_BSLE.topk(top_k, dim=-1).values[..., -1:]
            w_BSLE = w_BSLE * (w_BSLE >= least)
        return Weights(w_BSLE)

    return select
