"""Retrieval: every example goes to the expert whose training data has the most similar example.

The baseline of Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot
Generalization", https://arxiv.org/abs/2402.05859, section 4.2, after Jang et al.,
https://arxiv.org/abs/2302.03202.
"""

from __future__ import annotations

from typing import Annotated

import torch
from experthub.merge import EncoderName, ExamplesPerTask, Options, Range, ShapesState
from experthub.routing._pool import Batch, Embedder, Pool, RouterMaterials, Select, State
from experthub.routing._router import Weights
from experthub.routing._routers import Routing, routers
from experthub.routing._state import StateError, read_tensor
from torch import Tensor


def build_index(materials: RouterMaterials, options: Options) -> State:
    """Embed examples of every expert's own tasks.

    Args:
        materials: The materials, which load the encoder and the texts.
        options: The options of the router; `embedder` names a sentence encoder.

    Returns:
        `index` `[N, D]`, unit embeddings, and `owner` `[N]`, the expert that each belongs to.
    """
    embedder = materials.load_embedder(options["embedder"])
    rows, owners = [], []
    for e, label in enumerate(materials.labels):
        materials.report(f"embedding examples for {label}", e, len(materials.labels))
        texts = materials.read_texts(e)
        rows.append(embedder(texts))
        owners += [e] * len(texts)
    materials.report("embedding examples", len(materials.labels), len(materials.labels))
    tensors = {"index": torch.cat(rows), "owner": torch.tensor(owners)}
    return State(tensors, embedder.fingerprint)


def read_index(pool: Pool) -> tuple[Tensor, Tensor]:
    """Read the index of examples from the state of a router.

    Args:
        pool: The experts, with the index as state.

    Returns:
        The embeddings `[N, D]`, and the expert `[N]` that each belongs to.

    Raises:
        StateError: A tensor is missing or has a wrong shape, or an owner is not an expert.
    """
    index_ND = read_tensor(pool.state, "index", None, None)
    owner_N = read_tensor(pool.state, "owner", len(index_ND), dtype=torch.int64)
    least, most = int(owner_N.min()), int(owner_N.max())
    if least < 0 or most >= pool.n_experts:
        raise StateError(
            f"the tensor 'owner' of the state has owners from {least} to {most}, "
            f"and the recipe has {pool.n_experts} experts"
        )
    return index_ND, owner_N


def embed_queries(embed: Embedder, batch: Batch, index_ND: Tensor) -> Tensor:
    """Embed the texts of a batch, to compare them with an index.

    Args:
        embed: The sentence encoder.
        batch: The rows.
        index_ND: The embeddings of the index `[N, D]`.

    Returns:
        Unit embeddings `[B, D]`.

    Raises:
        StateError: The encoder makes embeddings of another width.
    """
    query_BD = batch.place(embed(batch.texts))
    if query_BD.shape[1] != index_ND.shape[1]:
        raise StateError(
            f"the index has embeddings of {index_ND.shape[1]} features, "
            f"and the encoder makes {query_BD.shape[1]}"
        )
    return query_BD


@routers.register(
    paper="https://arxiv.org/abs/2402.05859",
    needs=("index",),
    prepare=build_index,
    routing=Routing("example", "model", sparse=True),
)
def retrieval(
    pool: Pool,
    *,
    examples: Annotated[int, Range(1), ShapesState, ExamplesPerTask] = 128,
    embedder: Annotated[str, EncoderName] = "all-minilm-l6-v2",
) -> Select:
    """Use the one expert that was trained on the example most similar to the input.

    An input is embedded once, when its first tokens are read, and compared with stored examples of
    every expert's own task. The expert with the largest cosine serves the whole input.

    Args:
        pool: The experts, with the index as state.
        examples: Examples that are stored for every expert, from its task's training split; 1000
            in the paper.
        embedder: The base that embeds examples and inputs: a sentence encoder.

    Returns:
        A function from rows to weights.
    """
    index_ND, owner_N = read_index(pool)
    embed = pool.load_embedder(embedder)

    def select(batch: Batch) -> Weights:
        query_BD = embed_queries(embed, batch, index_ND)
        nearest_B = owner_N[(query_BD @ index_ND.T).argmax(-1)]
        return Weights(query_BD.new_ones(len(query_BD), 1), nearest_B[:, None])

    return select
