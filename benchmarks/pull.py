"""Time `hub pull` against huggingface_hub's snapshot_download, both from one Hub on this machine.

The Hub holds an expert with one large file and a base with eight files. Every pull runs in a fresh
process with empty caches.
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
from experthub.hub.files.digests import sha256_of
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from hf_store import Store

TARGET = 1.0
MODULES, RANK, WIDTH = 64, 16, 24_576  # the size of the expert
SHARDS, ROWS, COLUMNS = 8, 1000, 5000  # the size of the base
SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
SETTINGS |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@dataclass(frozen=True)
class Published:
    """A repository on the Hub.

    Attributes:
        name: The name of the repository.
        files: The weight files on the Hub.
        words: The arguments of `hub pull` for it.
    """

    name: str
    files: tuple[Path, ...]
    words: str

    @property
    def bytes(self) -> int:
        """The size of all weight files."""
        return sum(file.stat().st_size for file in self.files)

    def words_for(self, side: str) -> str:
        """Return the arguments of a pull by `hub` or by `snapshot_download`."""
        return self.words if side == "hub" else f"alice/{self.name}"


def make_expert(folder: Path) -> None:
    """Write a random LoRA of 200 MB.

    Args:
        folder: The folder of the expert.
    """
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
    """Write a model with its weights in eight files of 20 MB.

    Args:
        folder: The folder of the model.
    """
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
    """Publish a folder on the Hub under its name.

    Args:
        store: The store of the Hub.
        folder: The folder.

    Returns:
        The weight files on the Hub.
    """
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
    """Pulls in fresh processes, with empty caches below a folder.

    Args:
        home: The folder of the caches.
        url: The address of the Hub.
        python: The interpreter of each side.
    """

    def __init__(self, home: Path, url: str, python: dict[str, Path]) -> None:
        self.home, self.url, self.python = home, url, python
        self.versions: dict[str, str] = {}

    def seconds(self, side: str, what: Published) -> float:
        """Time one pull.

        Args:
            side: `hub` or `snapshot_download`.
            what: The repository.

        Returns:
            The time in seconds.

        Raises:
            RuntimeError: If the pulled bytes differ from the published bytes.
        """
        shutil.rmtree(self.home, ignore_errors=True)
        os.sync()  # so that this pull does not wait for what the last one wrote
        places = {"HF_HOME": str(self.home / "hf"), "HUB_HOME": str(self.home / "hub")}
        variables = SETTINGS | places | {"HF_ENDPOINT": self.url}
        peer = Peer(self.python[side], "_puller.py", side, variables=variables)
        taken = float(peer.ask(what.words_for(side)))
        peer.close()
        self.versions |= peer.versions
        found = {sha256_of(path) for path in self.home.rglob("*") if path.is_file()}
        if not {path.name for path in what.files} <= found:
            raise RuntimeError(f"{side} pulled other bytes of {what.name} than were published")
        return taken


def socket(url: str, what: Published) -> None:
    """Read every byte from one connection and discard it, which is the limit of a pull.

    Args:
        url: The address of the Hub.
        what: The repository.
    """
    buffer = bytearray(1 << 20)
    line = http.client.HTTPConnection(urlsplit(url).netloc)
    for path in what.files:
        line.request("GET", f"/cdn/alice/{what.name}/lfs/{path.name}")
        answer = line.getresponse()
        while answer.readinto(buffer):
            pass
    line.close()


def sha256(what: Published) -> None:
    """Hash every byte once.

    Args:
        what: The repository.
    """
    for path in what.files:
        sha256_of(path)


def written(folder: Path, what: Published) -> None:
    """Write every byte once, with an fsync.

    Args:
        folder: The folder for the copies.
        what: The repository.
    """
    for number, path in enumerate(what.files):
        with path.open("rb") as source, (folder / str(number)).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())


def measured(published: list[Published], pull: Puller, bare: Path, rounds: int) -> Times:
    """Time every case, which is named after the repository and the action.

    Args:
        published: The repositories.
        pull: The pulls.
        bare: A folder for copies of the files.
        rounds: The number of rounds.

    Returns:
        The seconds of each case.
    """
    cases: dict[str, Callable[[], float]] = {}
    for what in published:
        for side in ("hub", "snapshot_download"):
            cases[f"{what.name}, {side}"] = partial(pull.seconds, side, what)
        cases[f"{what.name}, socket"] = timed(partial(socket, pull.url, what))
        cases[f"{what.name}, sha256"] = timed(partial(sha256, what))
        cases[f"{what.name}, written"] = timed(partial(written, bare, what))
    return run_rounds(cases, rounds)


def report(published: list[Published], times: Times) -> dict[str, Any]:
    """Print the table.

    Args:
        published: The repositories.
        times: The seconds of each case.

    Returns:
        The numbers of the table.
    """
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
    print(f"target: at least {TARGET} times the throughput of snapshot_download")
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
