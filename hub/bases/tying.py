"""Weights that several modules of a model share."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from experthub.hub.recipes.plan import Plan
from torch import nn


def untie(model: Any, names: Collection[str], plan: Plan) -> Any:
    """Give tied input and output embeddings weights of their own where their changes may differ.

    names: of the parameters that will change.  A LoRA on one of the two changes that use of the
    weight only, as peft applies it; a task vector changes the weight itself, unless it names the
    output too.  Returns the configuration from before, if they were tied.
    """
    outputs = model.get_output_embeddings()
    inputs = None if outputs is None else model.get_input_embeddings()
    if inputs is None or inputs.weight is not outputs.weight:
        return None
    before = model.config
    tied = {name for name in names if model.get_parameter(name) is inputs.weight}
    first = next(name for name, p in model.named_parameters() if p is inputs.weight)
    adapted = {f"{a.module}.weight" for member in plan.members for a in member.adapted}
    if tied - {first} or tied & adapted:
        outputs.weight = nn.Parameter(inputs.weight.detach().clone(), requires_grad=False)
        model.config = copy.deepcopy(model.config)
        model.config.tie_word_embeddings = False
    return before


def tie_again(model: Any, before: Any) -> None:
    """Let input and output embeddings share their weights where both changed alike."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config is before or torch.equal(inputs.weight, outputs.weight):
        outputs.weight, model.config = inputs.weight, before
