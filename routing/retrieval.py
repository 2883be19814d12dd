"""Retrieval: every example goes to the expert whose training examples hold the most similar one.

The baseline of Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot
Generalization", https://arxiv.org/abs/2402.05859, section 4.2, after Jang et al.,
https://arxiv.org/abs/2302.03202.
"""

from __future__ import annotations

from typing import Annotated

from experthub.merge import Range, Routing
from experthub.routing._methods import routers
from experthub.routing._pool import Pool, Select
from experthub.routing._router import Weights
from torch import Tensor


@routers.register(
    paper="https://arxiv.org/abs/2402.05859",
    needs=("index",),
    learns=True,
    routing=Routing("example", "model", sparse=True),
)
def retrieval(
    pool: Pool,
    *,
    examples: Annotated[int, Range(1)] = 128,
    embedder: str = "all-minilm-l6-v2",
) -> Select:
    """The one expert that was trained on the example most similar to the input.

    An input is embedded once, when its first tokens are read, and compared with stored examples of
    every expert's own task; the expert with the largest cosine serves the whole input.

    examples: stored of every expert, of its task's training split; 1000 in the paper.  embedder: the
    base that embeds them, a sentence encoder.
    """
    index_ND, owner_N = pool.state["index"], pool.state["owner"].long()

    def select(query_BD: Tensor) -> Weights:
        nearest_B = owner_N[(query_BD @ index_ND.T).argmax(-1)]
        return Weights(query_BD.new_ones(len(query_BD), 1), nearest_B[:, None])

    return select
