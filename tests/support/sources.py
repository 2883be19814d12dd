"""The source files of the packages, for tests that read them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "hub", "routing", "merge")  # A package imports only packages to its right.
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
