"""Concatenate: soft prompts one behind the other, in the order of the recipe.

Soft prompts are those of Lester et al., https://arxiv.org/abs/2104.08691, and prefixes those of Li and
Liang, https://arxiv.org/abs/2101.00190. A model reads a concatenation as it reads several texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experthub.merge._merges import merges
from torch import Tensor


@merges.register(paper="https://arxiv.org/abs/2104.08691", order_dependent=True, prompts=True)
def concatenate(prompts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Put soft prompts or prefixes one behind the other, in the order of `experts:`.

    The result is one soft prompt with the virtual tokens of all experts. Every other merge combines
    changes of weights, and this one takes soft prompts and prefixes alone.

    Args:
        prompts: The embeddings `[N, H]` of E soft prompts, or the keys or the values `[L, A, N, D]`
            of E prefixes, with any number of virtual tokens N each.
        weights: The experts' weights `[E]`, which are all 1.

    Returns:
        One tensor with all virtual tokens.

    Raises:
        ValueError: A weight is not 1, or the shapes differ in more than the number of tokens.
    """
    if len(prompts) != len(weights) or bool((weights != 1).any()):
        raise ValueError(f"expected {len(prompts)} weights of 1, found {weights.tolist()}")
    shapes = {(*prompt.shape[:-2], prompt.shape[-1]) for prompt in prompts}
    if len(shapes) != 1:
        raise ValueError(f"expected soft prompts of one width, found {sorted(shapes)}")
    return torch.cat(list(prompts), -2)
