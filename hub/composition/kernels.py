"""Which routing kernels are the fastest on this machine: measured once for each shape, and kept."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from itertools import product
from typing import get_args

import torch
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.json_files import read_json
from experthub.routing import Group, Kernel, Selected, fastest, shape

PAIRS = [list(pair) for pair in product(get_args(Kernel), repeat=2)]


def tune(groups: Iterable[Group]) -> None:
    """Give every group the kernels that `kernels/measured.json` names for its shape, measured if it has none.

    Kernels round differently, so a recipe gives the same bits again only with the same ones.  Groups
    whose experts are chosen for whole rows keep theirs: before a row is read there is nothing to time.
    """
    file = hub_home() / "kernels" / "measured.json"
    try:
        known = read_json(file) if file.is_file() else {}
    except HubError:  # damaged: it is written anew
        known = {}
    machine = f"{platform.node()} torch {torch.__version__} {torch.get_num_threads()} threads"
    measured = False
    for group in groups:
        if isinstance(group.router, Selected):
            continue
        key = f"{machine} {shape(group)}"
        found = known.get(key)
        if found not in PAIRS:
            found, measured = list(fastest(group)), True
            known[key] = found
        group.few, group.many = found
    if measured:
        write_json(file, known)
