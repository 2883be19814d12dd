"""Weights that the input and output embeddings of a model share."""

from __future__ import annotations

import copy
from collections.abc import Collection, Set
from typing import Any

import torch
from torch import nn


def untie(model: Any, names: Collection[str], adapted: Set[str]) -> Any:
    """Separate tied input and output embeddings where their changes may differ.

    A LoRA on one of the two changes only that use of the weight, as peft applies it. A task vector
    changes the weight itself, unless it also names the output embedding.

    Args:
        model: A transformers model, which is changed in place.
        names: The names of the parameters that will change.
        adapted: The names of the parameters that a LoRA changes.

    Returns:
        The model's configuration before the call; None if the embeddings were not tied.
    """
    outputs = model.get_output_embeddings()
    inputs = None if outputs is None else model.get_input_embeddings()
    if inputs is None or inputs.weight is not outputs.weight:
        return None
    before = model.config
    tied = {name for name in names if model.get_parameter(name) is inputs.weight}
    first = next(name for name, p in model.named_parameters() if p is inputs.weight)
    if tied - {first} or tied & adapted:
        outputs.weight = nn.Parameter(inputs.weight.detach().clone(), requires_grad=False)
        model.config = copy.deepcopy(model.config)
        model.config.tie_word_embeddings = False
    return before


def tie_again(model: Any, before: Any) -> None:
    """Tie input and output embeddings again if both changed alike.

    Args:
        model: The transformers model, which is changed in place.
        before: The configuration that `untie` returned.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config is before or torch.equal(inputs.weight, outputs.weight):
        outputs.weight, model.config = inputs.weight, before
