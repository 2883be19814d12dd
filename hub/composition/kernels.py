"""The fastest routing kernels of this machine, measured once for each shape and kept."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.json_files import read_json
from experthub.routing import (
    KERNELS,
    Group,
    ModelRouter,
    current_kernel,
    describe_shape,
    measure_kernels,
    recorded_kernel,
)

PAIRS = [list(pair) for pair in product(map(recorded_kernel, KERNELS), repeat=2)]


def choose_kernels(groups: Iterable[Group]) -> None:
    """Give each group the kernels that are the fastest for its shape.

    They are those that `kernels/measured.json` names; a shape that it does not have is measured now.
    Kernels round differently, so a recipe gives the same bits again only with the same kernels.
    Groups whose experts are chosen for whole rows keep their kernels: before a row is read there is
    nothing to time.

    Args:
        groups: The groups of a composed model, which are changed.
    """
    file = hub_home() / "kernels" / "measured.json"
    try:
        known = read_json(file) if file.is_file() else {}
    except HubError:  # damaged: it is written anew
        known = {}
    machine = f"{platform.node()} torch {torch.__version__} {torch.get_num_threads()} threads"
    measured = False
    for group in groups:
        if isinstance(group.packed.router, ModelRouter):
            continue
        key = f"{machine} {describe_shape(group)}"
        found = known.get(key)
        if found not in PAIRS:
            found, measured = [recorded_kernel(kernel) for kernel in measure_kernels(group)], True
            known[key] = found
        few, many = map(current_kernel, found)
        group.kernels = replace(group.kernels, few=few, many=many)
    if measured:
        write_json(file, known)
