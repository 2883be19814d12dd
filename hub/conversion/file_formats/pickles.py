"""Pickles of torch, which a sandboxed process of its own turns into safetensors."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from experthub.hub.conversion.file_formats.peft_files import make_adapter, open_tensors
from experthub.hub.conversion.foreign_adapter import ForeignAdapter
from experthub.hub.conversion.found_adapter import FoundAdapter
from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import hub_home, open_draft_folder

CHILD = Path(__file__).with_name("pickle_child.py")
SECONDS = 900  # The time for one file.


def read_pickle(found: FoundAdapter, adapter: str | None, opened: ExitStack) -> ForeignAdapter:
    """Read the adapter in a pickle.

    Args:
        found: The adapter.
        adapter: The adapter to choose, if the file holds several.
        opened: It removes the written tensors when it is closed.

    Returns:
        The adapter.

    Raises:
        IntegrityError: The file holds anything but tensors, or the process broke a limit.
    """
    folder = opened.enter_context(open_draft_folder(hub_home() / "drafts" / "unpickled"))
    target = folder / "tensors.safetensors"
    # The child gets no token, no proxy and no path of this user's home.
    environment = {"OMP_NUM_THREADS": "1", "PATH": os.defpath, "HOME": str(folder)}
    command = [sys.executable, "-I", "-P", str(CHILD), str(found.weights.resolve()), str(target)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refuse(found, f"reading it took more than {SECONDS} s") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        if done.returncode < 0:
            reason = f"its process was stopped by the signal {-done.returncode}"
        raise _refuse(found, reason)
    if target.is_symlink() or not target.is_file():
        raise _refuse(found, "its process wrote no tensors")
    try:
        read = make_adapter(open_tensors(target), found, adapter)
    except IntegrityError as error:
        error.message = error.message.replace(str(target), str(found.weights))
        raise
    read.notes.append(f"read {found.weights.name}, a pickle, in a process of its own")
    return read


def _refuse(found: FoundAdapter, reason: str) -> IntegrityError:
    """Return the error for a pickle that could not be read."""
    return IntegrityError(
        f"{found.weights} holds more than tensors, or is damaged: {reason}",
        "ask its author for safetensors",
    )
