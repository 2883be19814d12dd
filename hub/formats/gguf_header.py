"""Checks of a GGUF file's header: its own reader trusts every count that the file states."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from experthub.hub.errors import IntegrityError

MAGIC, VERSIONS = b"GGUF", (2, 3)
# The bytes of a value by the number of its type. Strings (8) and arrays (9) state their length.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_GGUF_SIDES = 4
MAX_ENTRIES = 1 << 40  # The entries of one tensor.


def check_gguf(path: Path) -> set[int]:
    """Check that the header of a GGUF file states nothing that the file cannot hold.

    Args:
        path: The file.

    Returns:
        The numbers of the types that its tensors have, such as 12 for Q4_K.

    Raises:
        IntegrityError: The file is not GGUF, is cut, or states an impossible count.
    """
    try:
        with path.open("rb") as file:
            scanner = _Scanner(file, path.stat().st_size)
            scanner.scan()
            return scanner.types
    except ValueError as fact:
        raise IntegrityError(
            f"{path.name} is not a whole GGUF file: {fact}",
            "fetch or copy the file again, or name another one",
        ) from None


class _Scanner:
    """A reader that goes over the header once. Each step raises ValueError beyond the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.types: set[int] = set()

    def scan(self) -> None:
        """Read the whole header."""
        magic, version = self._take(4), self._number("<I")
        if magic != MAGIC or version not in VERSIONS:
            raise ValueError(f"it starts with {magic!r} and the version {version}")
        n_tensors, n_values = self._count(24), self._count(13)
        for _ in range(n_values):
            self._skip_string()
            self._skip_value(self._number("<I"))
        for _ in range(n_tensors):
            self._skip_string()
            sides = self._number("<I")
            if not 0 <= sides <= MAX_GGUF_SIDES:
                raise ValueError(f"a tensor has {sides} dimensions")
            entries = 1
            for _ in range(sides):
                entries *= self._number("<Q")
            self.types.add(self._number("<I"))
            if entries > MAX_ENTRIES or self._number("<Q") > self.size:
                raise ValueError("a tensor lies outside of the file")

    def _skip_value(self, kind: int) -> None:
        """Skip the value of a key."""
        if kind == STRING:
            self._skip_string()
        elif kind == ARRAY:
            inner = self._number("<I")
            if inner != STRING and inner not in WIDTHS:  # No writer nests arrays.
                raise ValueError(f"an array has items of the type {inner}")
            count = self._count(WIDTHS.get(inner, 8))
            if inner == STRING:
                for _ in range(count):
                    self._skip_string()
            else:
                self._skip(count * WIDTHS[inner])
        elif kind in WIDTHS:
            self._skip(WIDTHS[kind])
        else:
            raise ValueError(f"a value has the type {kind}")

    def _count(self, least: int) -> int:
        """Read a number of items, each of which needs some bytes at least."""
        count = self._number("<Q")
        if count * least > self.size:
            raise ValueError(f"it states {count} items, and has {self.size} bytes")
        return count

    def _skip_string(self) -> None:
        """Skip a string."""
        self._skip(self._count(1))

    def _number(self, form: str) -> int:
        """Read a number."""
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> bytes:
        """Read some bytes."""
        found = self.file.read(count)
        if len(found) < count:
            raise ValueError("it is cut")
        return found

    def _skip(self, count: int) -> None:
        """Skip some bytes."""
        if self.file.seek(count, 1) > self.size:
            raise ValueError("it is cut")
