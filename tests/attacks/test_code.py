"""Code of strangers that must not run: pip.py, classes beside a model, and plug-ins of others."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama
from experthub.hub.bases import base as bases
from experthub.hub.bases import gguf
from experthub.hub.errors import IntegrityError
from experthub.hub.transfer.remotes import pypi
from tiny_gguf import write_gguf

pytestmark = pytest.mark.attack
ROOT = Path(__file__).resolve().parents[2]
MARK = "import pathlib\npathlib.Path({!r}).write_text('ran')\n"


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that exists once somebody's code has run."""
    return tmp_path / "ran"


@pytest.mark.parametrize("way", ["current folder", "PYTHONPATH", "PYTHONSTARTUP"])
def test_pip_is_the_one_of_this_python(
    way: str, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path.cwd() if way == "current folder" else tmp_path / "theirs"
    folder.mkdir(exist_ok=True)
    for name in ("pip", "optparse", "sitecustomize"):
        (folder / f"{name}.py").write_text(MARK.format(str(ran)))
    if way != "current folder":
        monkeypatch.setenv(way, str(folder / "pip.py" if way == "PYTHONSTARTUP" else folder))
    assert pypi.find_index_url().startswith("http") and not ran.exists()


@pytest.mark.parametrize("way", ["PIP_INDEX_URL", "PIP_CONFIG_FILE", "XDG_CONFIG_HOME", "HOME"])
def test_pip_keeps_the_user_s_index(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    url, text = "https://pypi.example/simple", "[global]\nindex-url = https://pypi.example/simple\n"
    places = {
        "PIP_CONFIG_FILE": Path("own.conf"),  # relative to the folder of the user
        "XDG_CONFIG_HOME": tmp_path / "xdg" / "pip" / "pip.conf",
        "HOME": tmp_path / "user" / ".config" / "pip" / "pip.conf",
    }
    if way in places:
        places[way].parent.mkdir(parents=True, exist_ok=True)
        places[way].write_text(text)
    values = {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": "own.conf"}
    values |= {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "user")}
    monkeypatch.setenv(way, values[way])
    assert pypi.find_index_url() == url


def test_no_token_goes_to_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "HF_TOKEN",
        "HUB_TOKEN",
        "HUB_REGISTRY_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "GITHUB_TOKEN",
    )
    for name in (*secrets, "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    seen: dict[str, Any] = {}

    def record(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        raise OSError

    monkeypatch.setattr(pypi.subprocess, "run", record)
    with pytest.raises(Exception, match="pip"):
        pypi.find_index_url()
    assert "secret" not in seen["env"].values() and {"-P", "-I"} < set(seen["command"])
    assert Path(seen["cwd"]) == Path(sys.prefix)


def test_every_python_module_that_is_run_is_isolated() -> None:
    found = 0
    for folder in ("hub", "cli", "merge", "routing", "benchmarks", "examples", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for before in re.findall(r'\[([^\[\]]*)"-m", "\w+"', path.read_text()):
                found += 1
                assert '"-P", "-I"' in before, f"{path} runs python -m without -P -I"
    assert found == 3


AUTO_MAP = {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}}
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenizer": ("tokenizer_config.json", AUTO_MAP),
    "config": ("config.json", {"auto_map": {"AutoConfig": "theirs.Tokenizer"}}),
    "generation": ("generation_config.json", {"auto_map": {"x": "theirs.Tokenizer"}}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "theirs.Tokenizer"}}),
    "adapter": ("adapter_config.json", {"base_model_name_or_path": "evil/base"}),
    "adapter code": ("adapter_config.json", {"auto_mapping": {"parent_library": "theirs"}}),
    "kernel": ("config.json", {"attn_implementation": "evil/kernel"}),
    "backbone": ("config.json", {"backbone": "evil/backbone"}),
}


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer yes to every question, and fail because one was asked."""

    def ask(prompt: str = "") -> str:
        pytest.fail(f"somebody was asked {prompt!r}")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.usefixtures("never_asked")
def test_what_lies_beside_a_gguf_file_is_checked_first(
    case: str, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, content = BESIDE[case]
    place = tmp_path / "gguf"
    place.mkdir()
    write_gguf(place / "x.gguf")
    (place / name).write_text(json.dumps(content))
    (place / "theirs.py").write_text(MARK.format(str(ran)) + "class Tokenizer: ...\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(IntegrityError, match=re.escape(name)):
        gguf.convert_gguf(place / "x.gguf", place)
    assert not ran.exists()


def test_a_gguf_file_is_converted(tmp_path: Path) -> None:
    gguf.convert_gguf(write_gguf(tmp_path / "x.gguf"), tmp_path)
    assert bases.read(tmp_path, "x").architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.usefixtures("never_asked")
def test_no_class_beside_a_base_is_imported(file: str, ran: Path, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base")
    (folder / "theirs.py").write_text(MARK.format(str(ran)) + "class Theirs: ...\n")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content["auto_map"] = {"AutoTokenizer": [None, "theirs.Theirs"], "AutoConfig": "theirs.Theirs"}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="auto_map"):
        bases.read(folder, "base")
    assert not ran.exists()
