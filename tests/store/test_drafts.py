"""Drafts and leases: what is there only while a process works, and goes when it was killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experthub.hub.files import atomic
from experthub.hub.store.store import Store

Make = Callable[..., Path]


def test_a_lease_grows_only_by_what_is_new(home: Path, expert_folder: Make) -> None:
    digests = [Store().add(expert_folder(seed))[0] for seed in (1, 2)]
    (lease,) = (home / "leases").iterdir()
    lines = lease.read_text().split()
    assert sorted(lines) == sorted(Store().list_objects()), (
        "the configuration, which both have, is once"
    )
    Store().hold(digests[0])
    assert lease.read_text().split() == lines
    lease.unlink()
    Store().hold(digests[0])
    (lease,) = (home / "leases").iterdir()
    assert sorted(lease.read_text().split()) == sorted(lines), "all that this process holds"


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    """The next draft of the same name removes it, but not one that somebody still writes."""
    dead = tmp_path / ".file.0123456789abcdef"
    dead.write_text("half")
    other = tmp_path / ".other.0123456789abcdef"
    other.write_text("half")
    for text in ("one", "two"):
        atomic.write_text(tmp_path / "file", text)
    assert not dead.exists() and other.exists()
    with atomic.open_draft_folder(tmp_path / "folder") as first:
        with atomic.open_draft_folder(tmp_path / "folder") as second:
            assert first.is_dir() and second.is_dir() and first != second
        assert first.is_dir() and not second.exists()
    assert not first.exists()


def test_a_draft_is_made_again_if_another_process_takes_it_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], Path.mkdir

    def make_and_lose_the_first(path: Path, *arguments: Any, **options: Any) -> None:
        make(path, *arguments, **options)
        if path.name.startswith(".folder"):
            made.append(path)
            if len(made) == 1:
                path.rmdir()

    monkeypatch.setattr(Path, "mkdir", make_and_lose_the_first)
    with atomic.open_draft_folder(tmp_path / "folder") as draft:
        assert draft.is_dir() and made == [made[0], draft]


def test_a_file_system_without_unnamed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    dead = tmp_path / ".file.0123456789abcdef"
    dead.write_text("half")
    for text in ("one", "two"):
        atomic.write_text(tmp_path / "file", text)
        assert [p.name for p in tmp_path.glob("*file*")] == ["file"]
    assert (tmp_path / "file").read_text() == "two"
    with pytest.raises(ValueError, match="stop"), atomic.open_atomically(tmp_path / "file"):
        assert len(list(tmp_path.glob("*file*"))) == 2
        raise ValueError("stop")
    assert [p.name for p in tmp_path.glob("*file*")] == ["file"]


def test_a_folder_that_is_in_use_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("x")
    with (
        pytest.raises(FileExistsError, match="not empty") as caught,
        atomic.create_folder(tmp_path / "folder") as draft,
    ):
        (draft / "new").write_text("y")
    assert caught.value.filename == str(tmp_path / "folder")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["kept"]
    assert not list(tmp_path.glob(".folder*")), "the draft is gone"
