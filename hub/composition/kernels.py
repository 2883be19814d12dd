"""The choice of the fastest routing kernels, which are measured once per shape and recorded."""

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
    describe_shape,
    find_recorded_name,
    measure_kernels,
    parse_kernel,
)

KERNEL_PAIRS = [list(pair) for pair in product(map(find_recorded_name, KERNELS), repeat=2)]


def choose_kernels(groups: Iterable[Group]) -> None:
    """Set the fastest kernels for each group.

    They are read from `kernels/measured.json`; a shape that is not recorded there is measured now.
    Kernels round differently, so a recipe gives the same bits again only with the same kernels.
    Groups whose experts are chosen for whole rows keep their kernels, because there is nothing to
    time before a row is read.

    Args:
        groups: The groups of a composed model, which are changed.
    """
    file = hub_home() / "kernels" / "measured.json"
    try:
        known = read_json(file) if file.is_file() else {}
    except HubError:  # A damaged record is written anew.
        known = {}
    machine = f"{platform.node()} torch {torch.__version__} {torch.get_num_threads()} threads"
    measured = False
    for group in groups:
        if isinstance(group.packed.router, ModelRouter):
            continue
        key = f"{machine} {describe_shape(group)}"
        found = known.get(key)
        if found not in KERNEL_PAIRS:
            found, measured = (
                [find_recorded_name(kernel) for kernel in measure_kernels(group)],
                True,
            )
            known[key] = found
        few, many = map(parse_kernel, found)
        group.kernels = replace(group.kernels, few=few, many=many)
    if measured:
        write_json(file, known)
