"""Adapters whose modules share tensors: VeRA, VB-LoRA and RandLoRA."""

from __future__ import annotations

import math

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.hub.errors import IntegrityError
from experthub.merge import LowRank
from torch import Tensor


def _vera(module: AdaptedModule) -> LowRank:
    """Return `diag(b) B diag(d) A`; A and B are cut from matrices that all modules share."""
    outputs, inputs = module.base.shape(module.path)
    if "vera_A" in module.shared:
        shared_a, shared_b = module.shared["vera_A"], module.shared["vera_B"]
    else:
        shared_a, shared_b = _draw_projections(module)
    d, b = module.tensors["vera_lambda_d"], module.tensors["vera_lambda_b"]
    return LowRank(d[:, None] * shared_a[:, :inputs], b[:, None] * shared_b[:outputs])


def _draw_projections(module: AdaptedModule) -> tuple[Tensor, Tensor]:
    """Draw the shared matrices from the key, as peft does for adapters without them."""
    shapes = [module.base.shape(path) for path in module.others]
    outputs, inputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    rank = module.setting("r", 256)
    generator = torch.Generator().manual_seed(module.setting("projection_prng_key", 0))
    drawn = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).double())
    return drawn[0], drawn[1]


register(
    AdapterType(
        "VERA",
        ("vera_lambda_b", "vera_lambda_d"),
        _vera,
        frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"}),
        shared=("vera_A", "vera_B"),
        low_rank=True,
        needs_base=True,
    )
)


def _vblora(module: AdaptedModule) -> LowRank:
    """Return `B A`, both put together from mixtures of the vectors of a bank."""
    a, b = (_mix_vectors(module, f"vblora_logits_{side}") for side in "AB")
    return LowRank(a.flatten(1), b.transpose(1, 2).flatten(0, 1))


def _mix_vectors(module: AdaptedModule, name: str) -> Tensor:
    """Return the mixtures of the best vectors for each place: `[rows, columns, length]`."""
    bank = module.shared["vblora_vector_bank"]
    if name in module.tensors:
        best, indices = module.tensors[name].topk(module.setting("topk", 2), dim=-1)
        weights = best.softmax(-1)
    else:  # Only the best were saved, without the last of their weights.
        indices = module.tensors[f"{name}_topk_indices"].long()
        first = module.tensors[f"{name}_topk_weights"]
        weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
    return (weights.unsqueeze(-1) * bank[indices]).sum(-2)


register(
    AdapterType(
        "VBLORA",
        tuple(
            f"vblora_logits_{side}{end}"
            for side in "AB"
            for end in ("", "_topk_indices", "_topk_weights")
        ),
        _vblora,
        frozenset(
            [
                "r",
                "num_vectors",
                "vector_length",
                "topk",
                "save_only_topk_weights",
                "vblora_dropout",
                "init_vector_bank_bound",
                "init_logits_std",
            ]
        ),
        shared=("vblora_vector_bank",),
        low_rank=True,
    )
)


def _randlora(module: AdaptedModule) -> LowRank:
    """Return the sum over pairs of fixed factors, each with a scale per rank and per input."""
    outputs, inputs = module.base.shape(module.path)
    if "randlora_A" not in module.tensors:
        raise IntegrityError(
            "the adapter was saved without its projections (save_projection is False)",
            "load the adapter with peft, and save it with save_projection=True",
        )
    strength, gamma = module.tensors["randlora_lambda"], module.tensors["randlora_gamma"]
    count, small = len(gamma), min(outputs, inputs)
    b = module.tensors["randlora_B"][: max(outputs, inputs), :count].flatten(1)
    a = strength[:, :, None] * module.tensors["randlora_A"][:, :count, :small] * gamma[None]
    a = a.flatten(0, 1)
    first, second = (a, b) if small == inputs else (b.T, a.T)
    return LowRank(first.contiguous(), second.contiguous(), _randlora_scale(module))


def _randlora_scale(module: AdaptedModule) -> float:
    """Return alpha over the rank."""
    return float(module.setting("randlora_alpha", 640)) / float(module.setting("r", 32))


register(
    AdapterType(
        "RANDLORA",
        ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        _randlora,
        frozenset(
            [
                "r",
                "randlora_alpha",
                "randlora_dropout",
                "projection_prng_key",
                "save_projection",
                "sparse",
                "very_sparse",
            ]
        ),
        shared=("randlora_A", "randlora_B"),
        low_rank=True,
        needs_base=True,
    )
)
