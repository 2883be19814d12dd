"""LoraRetriever: every example uses the experts whose tasks are the most similar to it.

Zhao et al., "LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the
Wild", https://arxiv.org/abs/2402.09997, sections 4.1 and 4.2: an expert is represented by the mean
embedding of some of its examples; the chosen experts are averaged, by their outputs (the paper's
"mixture") or by their parameters ("fusion").

There is one deviation: the paper fine-tunes its embedder with instructions on some of the tasks.
Here any sentence encoder is used unchanged.
"""

from __future__ import annotations

from typing import Annotated

import torch
from experthub.merge import EncoderName, ExamplesPerTask, Range, ShapesState
from experthub.routing._pool import Batch, Pool, Select
from experthub.routing._router import Weights
from experthub.routing._routers import Routing, routers
from experthub.routing.retrieval import build_index, embed_queries, read_index


@routers.register(
    paper="https://arxiv.org/abs/2402.09997",
    needs=("index",),
    prepare=build_index,
    routing=Routing("example", "model", sparse=True),
)
def lora_retriever(
    pool: Pool,
    *,
    top_k: Annotated[int, Range(1)] = 3,
    examples: Annotated[int, Range(1), ShapesState, ExamplesPerTask] = 20,
    embedder: Annotated[str, EncoderName] = "all-minilm-l6-v2",
) -> Select:
    """Use the top k experts by the cosine between the input and the mean of their examples.

    Each of the chosen experts gets the weight 1 / k.

    Args:
        pool: The experts, with the index as state.
        top_k: Experts per input; 3 in the paper. A number above that of the experts means all of them.
        examples: Examples of every expert's own task, whose mean embedding represents it.
        embedder: The base that embeds examples and inputs: a sentence encoder.

    Returns:
        A function from rows to weights.
    """
    index_ND, owner_N = read_index(pool)
    sums_ED = index_ND.new_zeros(pool.n_experts, index_ND.shape[1])
    means_ED = torch.nn.functional.normalize(sums_ED.index_add(0, owner_N, index_ND), dim=-1)
    k, embed = min(top_k, pool.n_experts), pool.load_embedder(embedder)

    def select(batch: Batch) -> Weights:
        query_BD = embed_queries(embed, batch, index_ND)
        chosen_Bk = (query_BD @ means_ED.T).topk(k, dim=-1).indices
        return Weights(query_BD.new_full(chosen_Bk.shape, 1 / k), chosen_Bk)

    return select
