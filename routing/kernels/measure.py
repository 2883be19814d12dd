"""Measuring: time the kernels for a group of modules, and find the fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from experthub.routing._group import Group, KernelChoice
from experthub.routing.kernels.names import Kernel

FEW, MANY = 1, 256  # The numbers of tokens that are timed.
ROUNDS = 5
# More numbers than a cache holds. Between two tokens a model reads all of its weights, so those of a
# group are no longer in the cache when they are read again.
COLD = 1 << 24
# Limits on the rows of A in one module: below LEAST, kernels are not timed; above MOST, `all` is not
# a candidate.
LEAST, MOST = 24, 1024


def describe_shape(group: Group) -> str:
    """Describe a group by everything that the time of its kernels depends on, except the machine.

    Args:
        group: A group of modules.

    Returns:
        The key under which measurements are recorded.
    """
    a = group.packed.a
    outputs = "+".join(str(b.matrix.shape[1]) for b in group.packed.b)
    ranks = f"{group.n_experts}x{a.rank}{'' if a.places_Er is None else '-'}"
    prefilter = "" if group.packed.prefilter is None else " screen"
    return (
        f"{ranks} {a.matrix.shape[1]}>{outputs} {group.combine} {a.matrix.dtype} "
        f"{group.dtype}{prefilter}"
    )


def measure_kernels(group: Group) -> tuple[Kernel, Kernel]:
    """Find the fastest kernels of a group by timing them with random inputs.

    Args:
        group: A group of modules.

    Returns:
        The kernel for few tokens, and the kernel for many.
    """
    a, plain = group.packed.a, group.dtype == torch.float32
    rows = group.n_experts * a.rank
    if rows < LEAST or a.matrix.device.type != "cpu":
        return group.kernels.few, group.kernels.many
    few: list[Kernel] = ["all"] if rows <= MOST else []
    many: list[Kernel] = ["all"] if rows <= MOST or not plain else []
    if plain or not few:
        few += ["gather"]
    if plain:
        many += ["sampled"]
    if plain and group.packed.prefilter is not None:
        few += ["prefilter"]
        many += ["prefilter"]
    return _find_fastest(group, FEW, few), _find_fastest(group, MANY, many)


@torch.no_grad()
def _find_fastest(group: Group, tokens: int, kernels: Sequence[Kernel]) -> Kernel:
    """Time kernels in turns, so that a slow moment of the machine affects all of them."""
    if len(kernels) == 1:
        return kernels[0]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, group.packed.a.matrix.shape[1], generator=random).to(group.dtype)
    outputs = [x.new_zeros(tokens, b.matrix.shape[1]) for b in group.packed.b]
    others = torch.zeros(COLD if tokens == FEW else 0)
    before, times = group.kernels, dict.fromkeys(kernels, float("inf"))
    for _ in range(ROUNDS):
        for kernel in kernels:
            group.kernels = KernelChoice(forced=kernel)
            others.add_(1)
            start = time.perf_counter()
            for module, y in enumerate(outputs):
                group.add_to(y, x, module)
            times[kernel] = min(times[kernel], time.perf_counter() - start)
    group.kernels = before
    return min(kernels, key=times.__getitem__)
