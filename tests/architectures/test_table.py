"""The table of architectures in the documentation is what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_table import PAGE, is_right, measure, read_rows, write_rows
from architectures import ROWS, Architecture


def test_the_table_has_every_architecture() -> None:
    rows = read_rows()
    assert list(rows) == [one.label for one in ROWS]
    assert write_rows(rows) == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "one",
    [pytest.param(one, id=one.label, marks=pytest.mark.slow if one.slow else ()) for one in ROWS],
)
def test_each_cell_is_what_is_measured(one: Architecture, tmp_path: Path) -> None:
    found, stated = measure(one, tmp_path), read_rows()[one.label]
    for name, cell in found.items():
        assert is_right(cell) == is_right(stated[name]), f"{name}: {cell}"
