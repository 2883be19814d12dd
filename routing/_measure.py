"""Which kernel is the fastest for a group of modules, on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from experthub.routing._group import Group, Kernel

TOKENS = {"few": 1, "many": 256}
ROUNDS = 5
COLD = 1 << 24  # numbers, more than a cache holds: from token to token a model reads all weights
# Rows of A in one module: of fewer all are read, of more never.
LEAST, MOST = 24, 1024


def shape(group: Group) -> str:
    """What the time of a group's kernels depends on, besides the machine."""
    outputs = "+".join(str(b.all.shape[1]) for b in group.b)
    ranks = f"{group.n_experts}x{group.a.rank}{'-' if group.a.ragged else ''}"
    return f"{ranks} {group.a.all.shape[1]}>{outputs} {group.combine} {group.a.all.dtype} {group.dtype}{' screen' * (group.screen is not None)}"


def fastest(group: Group) -> tuple[Kernel, Kernel]:
    """The kernels for few and for many tokens: the best of some, timed with random inputs."""
    rows, plain = group.n_experts * group.a.rank, group.dtype == torch.float32
    if rows < LEAST or group.a.all.device.type != "cpu":
        return group.few, group.many
    few: list[Kernel] = ["all"] if rows <= MOST else []
    many: list[Kernel] = ["all"] if rows <= MOST or not plain else []
    if plain or not few:
        few += ["copied"]
    if plain:
        many += ["sampled"]
    if plain and group.screen is not None:
        few += ["screened"]
        many += ["screened"]
    return _best(group, TOKENS["few"], few), _best(group, TOKENS["many"], many)


@torch.no_grad()
def _best(group: Group, tokens: int, kernels: Sequence[Kernel]) -> Kernel:
    if len(kernels) == 1:
        return kernels[0]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, group.a.all.shape[1], generator=random).to(group.dtype)
    outputs = [x.new_zeros(tokens, b.all.shape[1]) for b in group.b]
    others = torch.zeros(COLD if tokens == TOKENS["few"] else 0)
    before, times = group.kernel, dict.fromkeys(kernels, float("inf"))
    for _ in range(ROUNDS):
        for kernel in kernels:  # in turn, so that a slow moment meets both
            group.kernel = kernel
            others.add_(1)
            start = time.perf_counter()
            for module, y in enumerate(outputs):
                group.add_to(y, x, module)
            times[kernel] = min(times[kernel], time.perf_counter() - start)
    group.kernel = before
    return min(kernels, key=times.__getitem__)
