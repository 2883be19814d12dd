"""YAML 1.2's core schema, read and written."""

from __future__ import annotations

import math
from typing import Any

import pytest
from experthub.hub.errors import UsageError
from experthub.hub.files import yaml_files
from hypothesis import given, settings
from hypothesis import strategies as some

# Section 10.3.2 of the specification, and where YAML 1.1 differs.
SCALARS: dict[str, Any] = {
    "null": None,
    "~": None,
    "true": True,
    "FALSE": False,
    "yes": "yes",
    "on": "on",
    "12": 12,
    "-3": -3,
    "+3": 3,
    "0o17": 15,
    "017": 17,
    "0x1F": 31,
    "1_000": "1_000",
    "1:30": "1:30",
    "1e-4": 1e-4,
    "-.5e3": -500.0,
    "2.": 2.0,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "2024-01-01": "2024-01-01",
    "'3'": "3",
    '"true"': "true",
    "1e": "1e",
    "0o8": "0o8",
}
TREES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(),
    lambda leaf: some.lists(leaf) | some.dictionaries(some.text(min_size=1), leaf),
    max_leaves=12,
)


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=SCALARS)
def test_scalars_of_the_core_schema(text: str, value: Any) -> None:
    found = yaml_files.parse(f"a: {text}", "x").value["a"]
    assert found == value and type(found) is type(value)


def test_nan() -> None:
    assert math.isnan(yaml_files.parse("a: .NaN", "x").value["a"])


def test_lines_of_keys_and_items() -> None:
    document = yaml_files.parse("a: 1\nb:\n- x\n- c: {d: 2,\n    e: 3}\n", "f.yaml")
    assert document.at(("b", 1, "c", "e")) == "f.yaml, line 5"
    assert document.at(("b", 1, "c", "missing")) == "f.yaml, line 4"
    assert document.at(("a",)) == "f.yaml, line 1"


@settings(max_examples=100, deadline=None)
@given(some.dictionaries(some.text(min_size=1), TREES))
def test_what_is_written_is_read_back(value: dict[str, Any]) -> None:
    try:
        text = yaml_files.dump(value)
        found = yaml_files.parse(text, "x").value
    except UsageError as error:
        assert "not YAML" in str(error)  # characters that no YAML file can hold
        raise
    assert found == value


@settings(max_examples=300, deadline=None)
@given(some.text("ab:-?[]{},&*!|>'\"%@`#\n \t0.1~<", max_size=60))
def test_any_text_is_a_value_or_an_error(text: str) -> None:
    try:
        yaml_files.parse(text, "x")
    except UsageError as error:
        assert str(error).startswith("x")
