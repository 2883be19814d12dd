"""Time `hub pull` against huggingface_hub's snapshot_download, both from one Hub on this machine.

An expert of one large file, and a base of eight; every pull in a fresh process with empty caches.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import torch
from _bench import Times, arguments, finish, ratio, run_rounds, spread, surroundings, timed
from _peer import Peer, environment
from experthub.hub.files.atomic import sha256_of
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from hf_store import Store

TARGET = 1.0
MODULES, RANK, WIDTH = 64, 16, 24_576  # of the expert
SHARDS, ROWS, COLUMNS = 8, 1000, 5000  # of the base
SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
SETTINGS |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@dataclass(frozen=True)
class Published:
    """A repository on the Hub: its weights there, and what `hub pull` is told to get."""

    name: str
    files: tuple[Path, ...]
    words: str

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def words_for(self, side: str) -> str:
        return self.words if side == "hub" else f"alice/{self.name}"


def make_expert(folder: Path) -> None:
    """A random LoRA of 200 MB."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for module in range(MODULES):
        name = f"base_model.model.model.layers.{module}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = torch.randn(RANK, WIDTH, generator=random)
        tensors[f"{name}_B.weight"] = torch.randn(WIDTH, RANK, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))


def make_base(folder: Path) -> None:
    """A model folder with its weights in eight files of 20 MB."""
    random = torch.Generator().manual_seed(1)
    places = {}
    for shard in range(SHARDS):
        name = f"model.layers.{shard}.mlp.up_proj.weight"
        places[name] = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: torch.randn(ROWS, COLUMNS, generator=random)}, folder / places[name])
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))


def publish(store: Store, folder: Path) -> tuple[Path, ...]:
    """Put a folder on the Hub under its name; its weights there."""
    repository = store.create(f"alice/{folder.name}", private=False)
    lines: list[dict[str, Any]] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            blob = repository.lfs(sha256_of(path))
            blob.parent.mkdir(exist_ok=True)
            path.replace(blob)
            value = {"path": path.name, "oid": blob.name}
        else:
            value = {"path": path.name, "content": path.read_text()}
        key = "lfsFile" if "oid" in value else "file"
        lines.append({"key": key, "value": value})
    repository.append("main", "alice", {"summary": "all"}, lines)
    return tuple(sorted((repository.folder / "lfs").iterdir()))


class Puller:
    """Pulls in fresh processes, with empty caches below a folder.  python: per side."""

    def __init__(self, home: Path, url: str, python: dict[str, Path]) -> None:
        self.home, self.url, self.python = home, url, python
        self.versions: dict[str, str] = {}

    def seconds(self, side: str, what: Published) -> float:
        """How long a pull took; RuntimeError when the bytes are not the same."""
        shutil.rmtree(self.home, ignore_errors=True)
        os.sync()  # what the last one left to be written is not this one's
        places = {"HF_HOME": str(self.home / "hf"), "HUB_HOME": str(self.home / "hub")}
        variables = SETTINGS | places | {"HF_ENDPOINT": self.url}
        peer = Peer(self.python[side], "_puller.py", side, variables=variables)
        taken = float(peer.ask(what.words_for(side)))
        peer.close()
        self.versions |= peer.versions
        found = {sha256_of(path) for path in self.home.rglob("*") if path.is_file()}
        if not {path.name for path in what.files} <= found:
            raise RuntimeError(f"{side} brought other bytes of {what.name}")
        return taken


def socket(url: str, what: Published) -> None:
    """Every byte read off one connection, and forgotten: the least that a pull can do."""
    buffer = bytearray(1 << 20)
    line = http.client.HTTPConnection(urlsplit(url).netloc)
    for path in what.files:
        line.request("GET", f"/cdn/alice/{what.name}/lfs/{path.name}")
        answer = line.getresponse()
        while answer.readinto(buffer):
            pass
    line.close()


def sha256(what: Published) -> None:
    for path in what.files:
        sha256_of(path)


def written(folder: Path, what: Published) -> None:
    """Every byte written once, and fsynced."""
    for number, path in enumerate(what.files):
        with path.open("rb") as source, (folder / str(number)).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())


def measured(published: list[Published], pull: Puller, bare: Path, rounds: int) -> Times:
    """Seconds by case, which is named after the repository and what was done."""
    cases: dict[str, Callable[[], float]] = {}
    for what in published:
        for side in ("hub", "snapshot_download"):
            cases[f"{what.name}, {side}"] = partial(pull.seconds, side, what)
        cases[f"{what.name}, socket"] = timed(partial(socket, pull.url, what))
        cases[f"{what.name}, sha256"] = timed(partial(sha256, what))
        cases[f"{what.name}, written"] = timed(partial(written, bare, what))
    return run_rounds(cases, rounds)


def report(published: list[Published], times: Times) -> dict[str, Any]:
    """Print the table; its figures."""
    found = {}
    print(f"{'':26} {'median (smallest to largest)':32}   MB/s  x snapshot_download")
    for what in published:
        peer = f"{what.name}, snapshot_download"
        for case in (case for case in times if case.startswith(f"{what.name},")):
            speed = what.bytes / 1e6 / median(times[case])
            print(
                f"{case:26} {spread(times[case]):32} {speed:6.0f} {ratio(times, case, peer):6.3f}"
            )
        ratios = [b / a for a, b in zip(times[f"{what.name}, hub"], times[peer], strict=True)]
        smallest, largest = min(ratios), max(ratios)
        found[what.name] = {
            "bytes": what.bytes,
            "files": len(what.files),
            "throughput_ratio": median(ratios),
            "throughput_ratio_smallest_and_largest": [smallest, largest],
        }
        print(
            f"{what.name}: {median(ratios):.2f} ({smallest:.2f} to {largest:.2f}) times the "
            f"throughput of snapshot_download; {len(what.files)} files, {what.bytes:,} bytes"
        )
    print(f"target: at least {TARGET}")
    return found


def main() -> None:
    """Run the benchmark and print its table."""
    options = arguments(__doc__)
    python = environment(options.cache / "huggingface_hub-venv", ("huggingface_hub",))
    with TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("expert", "base", "bare"):
            (folder / place).mkdir()
        make_expert(folder / "expert")
        make_base(folder / "base")
        registry, store = folder / "registry.yaml", Store(folder / "server")
        registry.write_text("{version: 1, bases: {base: {sources: ['hf:alice/base']}}}")
        told = {"expert": "hf:alice/expert", "base": f"base --registry {registry}"}
        published = [Published(n, publish(store, folder / n), words) for n, words in told.items()]
        server = Peer(Path(sys.executable), "_hf_server.py", folder / "server")
        pythons = {"hub": Path(sys.executable), "snapshot_download": python}
        pull = Puller(folder / "home", server.versions, pythons)
        pull.seconds("snapshot_download", published[0])
        around = surroundings(pull.versions)
        times = measured(published, pull, folder / "bare", options.rounds)
        server.close()
        speeds = report(published, times)
    result = {
        "benchmark": "pull",
        "surroundings": around,
        "seconds": times,
        "median_seconds": {case: median(seconds) for case, seconds in times.items()},
        "speeds": speeds,
        "target": TARGET,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
