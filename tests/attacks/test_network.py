"""Libraries that would reach the network while the hub loads, converts, trains or saves models."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub, tiny_llama
from experthub.hub.bases import base as bases
from experthub.hub.bases.base import Base
from experthub.hub.bases.building import build_empty
from experthub.hub.bases.gguf import convert_gguf
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.transfer.remotes.no_network import forbid_network
from hf_server import HfServer
from tiny_gguf import write_gguf

pytestmark = pytest.mark.attack


@pytest.fixture(params=["online", "offline"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HfServer]:
    """A hub that records requests, with a token that nothing may send to it."""
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_read")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        if request.param == "offline":
            monkeypatch.setenv("HUB_OFFLINE", "1")
        yield made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that asks for a host or connects; nothing gets an answer."""
    seen: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        seen.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return seen


KEYS: dict[str, dict[str, Any]] = {
    "backbone": {"backbone": "evil/backbone"},
    "kwargs": {"backbone": "evil/backbone", "backbone_kwargs": {"trust_remote_code": True}},
    "only kwargs": {"backbone_kwargs": {"trust_remote_code": True}},
    "pretrained": {"use_pretrained_backbone": True},
    "timm": {"use_timm_backbone": True},
    "nested": {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/x"}},
    "deep": {"vision_config": {"inner": [{"backbone": "evil/backbone"}]}},
    "timm from the hub": {"vision_config": {"architecture": "hf-hub:evil/x"}},
    "pickle": {"vision_config": {"model_args": {"checkpoint_path": "theirs.bin"}}},
    "timm from a folder": {"architecture": "local-dir:/tmp/x"},
}


@pytest.mark.parametrize("case", KEYS)
def test_a_config_that_names_another_repository(case: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base")
    content = json.loads((folder / "config.json").read_text()) | KEYS[case]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="names another repository or file"):
        bases.read(folder, "base")


def test_the_name_of_a_timm_model_is_allowed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", vision_config={"architecture": "mobilenetv5_300m_enc"})
    assert bases.read(folder, "base").is_causal


def detr(folder: Path) -> Base:
    """A base whose class asks the Hub for a default backbone that no key of the config names."""
    folder.mkdir()
    content = {"model_type": "vitmatte", "architectures": ["VitMatteForImageMatting"]}
    content |= {"backbone": "evil/backbone"}
    (folder / "config.json").write_text(json.dumps(content))
    return Base("vision", folder, "", "", {}, 0, "F32")


@pytest.mark.parametrize("load", [build_empty, lambda b: load_model(b, "float32", None)])
def test_a_backbone_that_no_check_saw(
    load: Callable[[Base], Any], server: HfServer, opened: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(HubError, match="cannot load it"):
        load(detr(tmp_path / "base"))
    assert not opened


def test_loading_opens_no_socket(
    server: HfServer, opened: list[Any], base_folder: Path, tmp_path: Path
) -> None:
    base = bases.read(base_folder, "org/name")
    load_model(base, "float32", None)
    load_tokenizer(base)
    build_empty(base)
    convert_gguf(write_gguf(tmp_path / "x.gguf"), tmp_path)
    assert not opened


TRAIN = """
import os, sys
from experthub.cli.main import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize("server", ["offline"], indirect=True)
def test_training_does_not_ask_for_the_base_s_name(
    server: HfServer, base_folder: Path, tiny_task: str, tmp_path: Path
) -> None:
    """In a process of its own, with a token: peft would look up `org/name` at the Hub."""
    Path("registry.yaml").write_text(
        f"version: 1\nbases: {{org-name: {{sources: ['file:{base_folder}']}}}}\n"
    )
    words = ["train", "lora", "--base", "org-name", "--task", tiny_task, "--name", "x"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *words, "--steps", "1", "--rank", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert "Unable to fetch" not in done.stderr and not server.requests


def listen() -> socket.socket:
    """A socket that accepts whoever connects."""
    made = socket.create_server(("127.0.0.1", 0))
    made.settimeout(5)
    return made


def test_what_goes_past_huggingface_hub_is_refused() -> None:
    """timm and torch.hub use urllib; a socket of another thread is not touched."""
    from urllib.request import urlopen

    with contextlib.closing(listen()) as place:
        host, port = place.getsockname()
        connected: list[bool] = []

        def connect() -> None:
            with socket.create_connection((host, port), timeout=5):
                connected.append(True)

        with forbid_network():
            with pytest.raises(OSError, match="a library asked for"):
                urlopen(f"http://{host}:{port}/", timeout=1)
            with pytest.raises(OSError, match="a library asked for"):
                socket.create_connection((host, port))
            with pytest.raises(OSError, match="a library asked for"):
                socket.gethostbyname("localhost")
            thread = threading.Thread(target=connect)
            thread.start()
            thread.join()
        connect()
    assert connected == [True, True]


def test_huggingface_hub_is_offline_in_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with forbid_network():
        assert huggingface_hub.is_offline_mode()
        with forbid_network():
            pass
        assert huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with forbid_network():
        pass
    assert huggingface_hub.is_offline_mode()  # as the user set it


def test_no_command_asks_the_hub(server: HfServer, base_folder: Path, expert_folder: Any) -> None:
    Path("r.yaml").write_text(
        f"base: {base_folder}\nexperts: [{expert_folder()}]\nmerge: {{method: linear}}\n"
    )
    done = run_hub("compose", "r.yaml", "--out", "out")
    assert done.code == 0, done.err
    assert not server.requests
