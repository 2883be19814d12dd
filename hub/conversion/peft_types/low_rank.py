"""Adapters whose change has a known low rank: LoHa, AdaLoRA, MiSS and DeLoRA."""

from __future__ import annotations

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.lora_config import HARMLESS, HONOURED, REFUSED
from experthub.merge import LowRank


def _loha(module: AdaptedModule) -> LowRank:
    """Return `(B1 A1) * (B2 A2)`, whose rank is at most the product of both ranks.

    The entry `[o, i]` is a sum over pairs of columns of B1, B2 and of rows of A1, A2.
    """
    b1, a1, b2, a2 = (module.tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = module.setting("alpha", 8, "alpha_pattern") / module.setting("r", 8, "rank_pattern")
    b = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    a = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)
    return LowRank(a, b, scale)


register(
    AdapterType(
        "LOHA",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _loha,
        frozenset(
            [
                "r",
                "alpha",
                "rank_pattern",
                "alpha_pattern",
                "rank_dropout",
                "module_dropout",
                "use_effective_conv2d",
            ]
        ),
        low_rank=True,
    )
)


def _adalora(module: AdaptedModule) -> LowRank:
    """Return `B diag(E) A` times alpha over the rank that the training began with."""
    a, b, e = (module.tensors[name] for name in ("lora_A", "lora_B", "lora_E"))
    alpha = module.setting("lora_alpha", 8)
    alpha = alpha if alpha > 0 else len(a)
    return LowRank(a * e, b, alpha / (module.setting("init_r", 12) + 1e-5))


register(
    AdapterType(
        "ADALORA",
        ("lora_A", "lora_B", "lora_E"),
        _adalora,
        (frozenset(HARMLESS | HONOURED) - {"use_rslora"})
        | frozenset(
            [
                "target_r",
                "init_r",
                "tinit",
                "tfinal",
                "deltaT",
                "beta1",
                "beta2",
                "orth_reg_weight",
                "total_step",
                "init_lora_weights",
            ]
        ),
        {
            **{key: (values, reason) for key, (values, reason, _) in REFUSED.items()},
            "use_rslora": ((False, None), "AdaLoRA has a scale of its own"),
        },
        low_rank=True,
    )
)


def _miss(module: AdaptedModule) -> LowRank:
    """Return the block `[r, O]`, transposed and repeated along the inputs."""
    block = module.tensors["miss_block"]
    outputs, inputs = module.base.shape(module.path)
    if block.ndim != 2:
        raise IntegrityError(
            f"{module.path}: miss_block is {list(block.shape)}, not a matrix",
            "save the adapter again with peft",
        )
    if block.shape[1] != outputs:
        block = block.repeat(1, outputs // block.shape[1])
    tiles = torch.eye(len(block), dtype=block.dtype).repeat(1, -(-inputs // len(block)))
    return LowRank(tiles[:, :inputs].contiguous(), block.T.contiguous())


register(
    AdapterType(
        "MISS",
        ("miss_block",),
        _miss,
        frozenset({"r", "mini_r", "miss_dropout"}),
        {"init_weights": ((True, False, None, "mini"), "its blocks act on the base's weights")},
        low_rank=True,
        needs_base=True,
    )
)


def _delora(module: AdaptedModule) -> LowRank:
    """Return `B diag(lambda / (r |A_r| |B_r|)) A`, scaled by the norm of the base per input."""
    a, b = module.tensors["delora_A"], module.tensors["delora_B"]
    norms = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    strength = module.tensors["delora_lambda"] / len(a) / norms
    return LowRank(a * module.tensors["delora_w_norm"], b * strength)


register(
    AdapterType(
        "DELORA",
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        _delora,
        frozenset({"r", "delora_lambda", "rank_pattern", "lambda_pattern", "module_dropout"}),
        low_rank=True,
    )
)
