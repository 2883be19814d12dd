"""Against other programs: mlx-lm and llama.cpp with adapters, bitsandbytes with bases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experthub import hub
from experthub.hub.bases.gguf import convert_gguf
from peft_kinds import load, make_base
from safetensors.torch import load_file
from tiny_gguf import write_gguf, write_gguf_lora

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
# What the dynamic loader says if a library cannot be loaded here.
UNLOADED = ("version `GLIBC", "cannot open shared object file", "undefined symbol")


def find_peer(name: str) -> Path:
    """Return the environment of a peer; skip if it is absent."""
    folder = ROOT / "build" / "peers" / name
    if not (folder / ".installed").is_file():
        missing = f"{name} is not installed: make peers"
        if os.environ.get("HUB_PEERS") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    return folder


def run_peer(name: str, script: str, *words: object) -> None:
    """Run a script with a peer's interpreter; skip if the peer is absent or cannot run here."""
    python = find_peer(name) / "bin" / "python"
    done = subprocess.run(
        [python, SUPPORT / script, *map(str, words)], capture_output=True, text=True, check=False
    )
    # Its wheel may be built for a newer C library, or another processor, than this machine has.
    lines = [line for line in done.stderr.splitlines() if any(mark in line for mark in UNLOADED)]
    if lines or done.returncode == -signal.SIGILL:
        reason = lines[-1].strip() if lines else "this processor lacks an instruction"
        pytest.skip(f"{name} is installed and cannot be started on this machine: {reason[:300]}")
    assert done.returncode == 0, done.stderr[-2000:]


def compose(base: Path, expert: Path) -> torch.Tensor:
    """The logits of the composed expert on the fixed input of the scripts."""
    recipe = {"base": str(base), "experts": [str(expert)], "merge": {"method": "linear"}}
    with torch.no_grad():
        found: torch.Tensor = hub.compose(recipe).model(input_ids=torch.arange(4, 20)[None]).logits
    return found


def test_bitsandbytes() -> None:
    """The tests that need it run in a process that finds it beside the packages of this one."""
    (place,) = find_peer("bitsandbytes").glob("lib/python*/site-packages")
    words = ("-p", "no:cacheprovider", "-p", "no:xdist", "tests/bases/test_quantised.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words, "-k", "on_bitsandbytes"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding"])
def test_mlx(kind: str, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    run_peer("mlx", "mlx_script.py", base, tmp_path / "adapter", kind)
    hub.convert(tmp_path / "adapter", tmp_path / "out")
    right = load_file(tmp_path / "logits.safetensors")["logits"]
    off = compose(base, tmp_path / "out") - right
    assert float(off.abs().max()) < 1e-5 * float(right.abs().max())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama_cpp(kv_heads: int, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", kv_heads)
    lora = write_gguf_lora(tmp_path / "lora.gguf", kv_heads)
    run_peer("llama-cpp", "llama_cpp_script.py", model, lora, tmp_path / "logits.json")
    base = tmp_path / "base"
    base.mkdir()
    convert_gguf(model, base)
    hub.convert(lora, tmp_path / "out", base=str(base))
    right = {
        k: torch.tensor(v) for k, v in json.loads((tmp_path / "logits.json").read_text()).items()
    }
    with torch.no_grad():
        plain = load(base)(input_ids=torch.arange(4, 20)[None]).logits[0, -1]
    got = compose(base, tmp_path / "out")[0, -1]
    bound = 1e-3 * float(right["adapted"].abs().max())  # llama.cpp has kernels of its own.
    assert float((plain - right["base"]).abs().max()) < bound
    assert float((got - right["adapted"]).abs().max()) < bound
