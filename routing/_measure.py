"""Which kernel is the fastest for a group of modules, on this machine."""

from __future__ import annotations

import time

import torch
from experthub.routing._group import Group, Kernel

TOKENS = {"few": 1, "many": 256}
ROUNDS = 5
# Rows of A in one module, outside of which the answer is known: few are all read, many never are.
WORTH = range(24, 1025)


def shape(group: Group) -> str:
    """What the time of a group's kernels depends on, besides the machine."""
    outputs = "+".join(str(b.all.shape[1]) for b in group.b)
    ranks = f"{group.n_experts}x{group.a.rank}{'-' if group.a.ragged else ''}"
    return f"{ranks} {group.a.all.shape[1]}>{outputs} {group.combine} {group.a.all.dtype} {group.dtype}"


def fastest(group: Group) -> tuple[Kernel, Kernel]:
    """The kernels for few and for many tokens: the better of two, timed with random inputs."""
    device = group.a.all.device
    if group.n_experts * group.a.rank not in WORTH or device.type != "cpu":
        return group.few, group.many
    return _better(group, TOKENS["few"], "copied"), _better(group, TOKENS["many"], "sampled")


@torch.no_grad()
def _better(group: Group, tokens: int, other: Kernel) -> Kernel:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, group.a.all.shape[1], generator=random).to(group.dtype)
    outputs = [x.new_zeros(tokens, b.all.shape[1]) for b in group.b]
    kernels: tuple[Kernel, ...] = ("all", other) if group.dtype == torch.float32 else ("all",)
    before, times = group.kernel, dict.fromkeys(kernels, float("inf"))
    for _ in range(ROUNDS):
        for kernel in kernels:  # in turn, so that a slow moment meets both
            group.kernel = kernel
            start = time.perf_counter()
            for module, y in enumerate(outputs):
                group.add_to(y, x, module)
            times[kernel] = min(times[kernel], time.perf_counter() - start)
    group.kernel = before
    return min(kernels, key=times.__getitem__)
