"""The tiny linear module of the routers' golden files, its experts, and tokens that try them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INPUTS, OUTPUTS, RANK, TOP_K, EXPERTS = 12, 10, 4, 2, (1, 2, 5)


def short(random: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    """Random numbers of four decimals, in float64."""
    drawn = torch.randn(*shape, generator=random, dtype=torch.float64)
    return (drawn * size * 1e4).round() / 1e4


def make_case() -> dict[str, Any]:
    """A linear module, five experts for it with gates, and a batch of tokens.

    The tokens have a common mean, and one is so small that the epsilon of LayerNorm counts.  The
    last gate is untrained: zeros.
    """
    random = torch.Generator().manual_seed(0)
    count = EXPERTS[-1]
    case = {
        "weight": short(random, OUTPUTS, INPUTS, size=0.4),
        "bias": short(random, OUTPUTS, size=0.4),
        "a": short(random, count, RANK, INPUTS, size=0.4),
        "b": short(random, count, OUTPUTS, RANK, size=0.4),
        "gates": short(random, count, INPUTS, size=0.7),
        "x": short(random, 2, 5, INPUTS) + 0.5,
    }
    case["gates"][-1] = 0
    case["x"][1, 3] *= 0.004
    case["x"] = case["x"].round(decimals=4)
    return case


def write(script: str, written_by: dict[str, str], case: dict[str, Any], cases: list[Any]) -> None:
    """The file next to a script, under its name: what was given, and one line for each case."""
    header = {"written_by": written_by, "rank": RANK, "top_k": TOP_K}
    fields = [f"{json.dumps(key)}: {_line(value)}" for key, value in (header | case).items()]
    lines = ",\n".join(_line(one) for one in cases)
    fields.append(f'"cases": [\n{lines}\n]')
    Path(script).with_suffix(".json").write_text("{\n" + ",\n".join(fields) + "\n}\n")


def _line(value: Any) -> str:
    return json.dumps(value, default=lambda t: t.double().round(decimals=9).tolist())
