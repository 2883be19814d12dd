"""The session: what it opens, when it opens it, and what sessions share."""

from __future__ import annotations

from pathlib import Path

import pytest
from experthub.hub import Registry, Session, Store


def test_nothing_is_opened_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def read() -> Registry:
        opened.append("registry")
        return Registry(())

    monkeypatch.setattr(Registry, "read", read)
    first = Session()
    second = first.on("meta")
    assert opened == [] and (first.device, second.device) == (None, "meta")
    assert first.registry is second.registry is second.on(None).registry
    assert first.store is second.store
    assert opened == ["registry"]


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    registry, store = Registry(()), Store(tmp_path)
    told: list[str] = []
    session = Session(registry, store, "cpu", lambda what, *_: told.append(what))
    session.refresh()
    assert session.registry is registry and session.on("meta").store is store
    session.on("meta").report("reading", 0, 0)
    assert told == ["reading"] and session.device == "cpu"
