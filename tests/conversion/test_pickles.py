"""Pickles are read in a process of their own, which attacks cannot leave."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experthub import hub
from experthub.hub.conversion.file_formats.pickles import CHILD
from experthub.hub.errors import IntegrityError
from safetensors.torch import load_file
from wild_adapters import write_peft

FILE = "adapter_model.bin"


class Attack:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def write_bomb(path: Path) -> None:
    """A small archive that unpacks to 3 GiB."""
    torch.save({"x": torch.zeros(1024)}, path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, bytes(3 << 30) if "/data/" in name else data)


ATTACKS: dict[str, tuple[Callable[[Path, Attack], object], str]] = {
    "raw": (lambda p, a: p.write_bytes(pickle.dumps(a)), "not a file of tensors"),
    "in_a_state_dict": (lambda p, a: torch.save({"x": a}, p), "it calls"),
    "legacy": (
        lambda p, a: torch.save({"x": a}, p, _use_new_zipfile_serialization=False),
        "it calls",
    ),
    "expanded": (
        lambda p, a: torch.save({"x": torch.zeros(1).expand(1 << 40)}, p),
        "would need 4398046511104 bytes",
    ),
    "bomb": (lambda p, a: write_bomb(p), "allocate memory"),
    "list": (lambda p, a: torch.save([torch.zeros(1)], p), "it holds a list"),
    "damaged": (lambda p, a: p.write_bytes(b"PK\x03\x04junk"), "holds more than tensors"),
}


@pytest.mark.sampled(5)
@pytest.mark.attack
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_do_not_get_in(name: str, base_folder: Path, tmp_path: Path) -> None:
    folder = write_peft(base_folder, tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    write, reason = ATTACKS[name]
    write(folder / FILE, Attack(tmp_path / "got-in"))
    with pytest.raises(IntegrityError, match=reason) as caught:
        hub.convert(folder, tmp_path / "out")
    assert "weights_only" not in caught.value.message
    assert not (tmp_path / "got-in").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_keep_their_bits(legacy: bool, base_folder: Path, tmp_path: Path) -> None:
    folder = write_peft(base_folder, tmp_path / "a")
    right = load_file(folder / "adapter_model.safetensors")
    torch.save(right, folder / FILE, _use_new_zipfile_serialization=not legacy)
    (folder / "adapter_model.safetensors").unlink()
    made = hub.convert(folder, tmp_path / "out")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert got.keys() == right.keys() and all(torch.equal(got[n], right[n]) for n in right)
    assert made.made_from["format"] == "a pickle of torch"


PROBE = """
import importlib.util, os, socket, sys, tempfile
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
inside = tempfile.mkdtemp()
child.leave_network()
child.allow_writes_in(inside)
open(inside + "/x", "w").close()
try:
    os.close(os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY))
    print("wrote")
except OSError:
    print("kept")
sys.addaudithook(child.refuse_event)
for call in (lambda: os.system("true"), lambda: socket.socket()):
    try:
        call()
        print("ran")
    except PermissionError:
        print("stopped")
"""


@pytest.mark.attack
@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_the_process_writes_nowhere_else_and_runs_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    done = subprocess.run(
        [sys.executable, "-I", "-P", "-c", PROBE, str(CHILD), str(outside)],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rest = done.stdout.split()
    assert rest == ["stopped", "stopped"]
    if first == "wrote":
        pytest.skip("this kernel has no Landlock")
    assert not outside.exists()
