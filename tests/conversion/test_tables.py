"""docs/adapters.md states what the present code does."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measuring() -> Any:
    spec = importlib.util.spec_from_file_location("measuring", ROOT / "docs/measure_adapters.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hundred_are_taken_converted_or_refused_as_the_page_says(
    measuring: Any, tmp_path: Path
) -> None:
    logging.disable(logging.WARNING)
    rows = measuring.try_hundred(tmp_path / "wild")
    assert sum(int(cell or 0) for cell in rows[-1][2:5]) == 100
    header = ["program", "case", "taken", "converted", "refused", "reason"]
    assert measuring.table(header, rows) in PAGE, "run python docs/measure_adapters.py"


@pytest.mark.slow
def test_the_types_become_and_differ_as_the_page_says(measuring: Any, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    stated = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in PAGE.splitlines() if line.startswith("| "))
    }
    for kind, became, *cells in measuring.measure_types(tmp_path):
        assert stated[kind][0] == became, "run python docs/measure_adapters.py"
        for got, there in zip(cells, stated[kind][1:], strict=True):
            if got.startswith(("1e", "0")):
                assert float(got) <= 10 * max(float(there), 1e-8), (kind, got, there)
            else:
                assert got == there, (kind, got, there)
