"""LoraRetriever: every example takes the experts whose tasks are the most similar to it.

Zhao et al., "LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the
Wild", https://arxiv.org/abs/2402.09997, sections 4.1 and 4.2: an expert is the mean embedding of
some of its examples; the chosen are averaged, by their outputs (their "mixture") or their
parameters ("fusion").  One deviation: the paper tunes its embedder with instructions on a part of
the tasks, and ours is any sentence encoder as it is.
"""

from __future__ import annotations

from typing import Annotated

import torch
from experthub.merge import Range, Routing
from experthub.routing._methods import routers
from experthub.routing._pool import Pool, Select
from experthub.routing._router import Weights
from torch import Tensor


@routers.register(
    paper="https://arxiv.org/abs/2402.09997",
    needs=("index",),
    learns=True,
    routing=Routing("example", "model", sparse=True),
)
def lora_retriever(
    pool: Pool,
    *,
    top_k: Annotated[int, Range(1)] = 3,
    examples: Annotated[int, Range(1)] = 20,
    embedder: str = "all-minilm-l6-v2",
) -> Select:
    """The top k experts by the cosine between the input and the mean of their examples, 1 / k each.

    top_k: experts per input, at least 1; 3 in the paper, and more than there are means all.
    examples: of every expert's own task, whose mean embedding stands for it.  embedder: the base
    that embeds them, a sentence encoder.
    """
    index_ND, owner_N = pool.state["index"], pool.state["owner"].long()
    sums_ED = index_ND.new_zeros(pool.n_experts, index_ND.shape[1])
    means_ED = torch.nn.functional.normalize(sums_ED.index_add(0, owner_N, index_ND), dim=-1)
    k = min(top_k, pool.n_experts)

    def select(query_BD: Tensor) -> Weights:
        chosen_Bk = (query_BD @ means_ED.T).topk(k, dim=-1).indices
        return Weights(query_BD.new_full(chosen_Bk.shape, 1 / k), chosen_Bk)

    return select
