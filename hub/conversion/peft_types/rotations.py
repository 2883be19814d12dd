"""Adapters that rotate the inputs or outputs of modules: OFT, BOFT and RoAd."""

from __future__ import annotations

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.hub.errors import IntegrityError
from experthub.merge import Dense
from torch import Tensor


def _cayley(skew: Tensor) -> Tensor:
    """Return `(I - S) (I + S)^-1` of skew-symmetric matrices `[..., n, n]`."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    found: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return found


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """Return the truncated series of the Cayley transform as peft computes it.

    It is `I + 2 S + 2 S^2 + ... + S^n`: from three terms on, the last power counts once.
    """
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def _oft(module: AdaptedModule) -> Dense:
    """Return `W R^T - W` for the block-diagonal rotation R of the inputs."""
    vectors = module.tensors["oft_R.weight"]
    count = vectors.shape[1]
    size = round((1 + (1 + 8 * count) ** 0.5) / 2)
    weight = module.base.weight(module.path)
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(vectors), size, size, dtype=vectors.dtype)
    skew[:, rows, columns] = vectors
    skew = skew - skew.transpose(1, 2)
    if module.setting("coft", False):
        limit = module.setting("eps", 6e-5) / len(skew) ** 0.5
        norms = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norms <= limit, skew, limit * skew / norms.clamp(min=1e-300))
    if module.setting("use_cayley_neumann", False):
        turns = _neumann(skew, module.setting("num_cayley_neumann_terms", 5))
    else:
        turns = _cayley(skew)
    blocks = weight.shape[1] // size
    if len(turns) != blocks and not (len(turns) == 1 and module.setting("block_share", False)):
        raise IntegrityError(
            f"{module.path}: its rotation has {len(turns)} blocks of {size}, "
            f"and the base's module has {weight.shape[1]} inputs",
            "use the base that the adapter was trained on",
        )
    split = weight.view(len(weight), blocks, size)
    turned = torch.einsum("obk,bck->obc", split, turns.expand(blocks, size, size))
    return Dense(turned.flatten(1) - weight)


register(
    AdapterType(
        "OFT",
        ("oft_R.weight",),
        _oft,
        frozenset(
            [
                "r",
                "oft_block_size",
                "module_dropout",
                "coft",
                "eps",
                "block_share",
                "use_cayley_neumann",
                "num_cayley_neumann_terms",
            ]
        ),
        needs_base=True,
    )
)


def _boft(module: AdaptedModule) -> Dense:
    """Return `diag(s) W R^T - W` for the block-diagonal rotation R; the bias stays as it is."""
    blocks, scales = module.tensors["boft_R"], module.tensors["boft_s"]
    if len(blocks) != 1:
        raise IntegrityError(
            f"{module.path}: it has {len(blocks)} butterfly factors, which peft computes on GPUs only",
            "merge the adapter with peft on a GPU, and store the difference with hub diff",
        )
    turns = _cayley(0.5 * (blocks[0] - blocks[0].transpose(1, 2)))
    weight = module.base.weight(module.path)
    split = weight.view(len(weight), len(turns), turns.shape[-1])
    turned = torch.einsum("obk,bck->obc", split, turns).flatten(1)
    return Dense(turned * scales - weight)


register(
    AdapterType(
        "BOFT",
        ("boft_R", "boft_s"),
        _boft,
        frozenset(["boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"]),
        needs_base=True,
    )
)


def _turn(module: AdaptedModule, values: Tensor) -> Tensor:
    """Rotate and scale pairs of outputs: `y * c + turned(y) * s`, for `values` `[O, ...]`."""
    size, variant = module.setting("group_size", 64), module.setting("variant", "road_1")
    theta, alpha = module.tensors["road_theta"], module.tensors["road_alpha"]
    if variant == "road_1":
        theta, alpha = (
            t.view(-1, size // 2).repeat_interleave(2, dim=0).flatten() for t in (theta, alpha)
        )
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
    elif variant == "road_2":
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
    else:
        theta, alpha = theta.view(-1, 2, size), alpha.view(-1, 2, size)
        cosine = (alpha[:, 0] * theta[:, 0].cos()).flatten()
        sine = (alpha[:, 1] * theta[:, 1].sin()).flatten()
    pairs = values.view(-1, 2, size // 2, *values.shape[1:])
    turned = torch.stack((-pairs[:, 1], pairs[:, 0]), 1).view(values.shape)
    shape = (-1,) + (1,) * (values.ndim - 1)
    return values * cosine.view(shape) + turned * sine.view(shape)


def _road(module: AdaptedModule) -> Dense:
    """Return `R W - W` for the rotation and scaling R of the outputs."""
    weight = module.base.weight(module.path)
    return Dense(_turn(module, weight) - weight)


def _road_bias(module: AdaptedModule) -> Tensor | None:
    """Return the change of the bias, which is rotated, too."""
    bias = module.base.bias(module.path)
    return None if bias is None else _turn(module, bias) - bias


register(
    AdapterType(
        "ROAD",
        ("road_theta", "road_alpha"),
        _road,
        frozenset({"group_size"}),
        {"variant": (("road_1", "road_2", "road_4"), "it is no known variant of RoAd")},
        needs_base=True,
        bias=_road_bias,
    )
)
