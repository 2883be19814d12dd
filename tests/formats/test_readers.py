"""Whatever a file or an answer holds, its reader returns a value or raises HubError, and no more.

Most documents are sound ones that were damaged: bits flipped, parts cut, doubled, exchanged, nested,
and fragments put in.  HUB_EXAMPLES says how many each reader gets, 300 by default; with `-s` each
says how many of them it took.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from experthub.hub.bases import base as bases
from experthub.hub.errors import HubError
from experthub.hub.files import patterns
from experthub.hub.files.checksummed_text import MANIFEST
from experthub.hub.files.patterns import matches_any
from experthub.hub.files.yaml_files import dump
from experthub.hub.formats.adapter import read_adapter
from experthub.hub.formats.coefficients import COEFFICIENTS, COEFFICIENTS_JSON, read_coefficients
from experthub.hub.formats.oci_layout import OciLayout
from experthub.hub.formats.prompt import PROMPT, read_prompt
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.formats.tar import list_members
from experthub.hub.formats.task_vector import SHARD, SHARD_INDEX, find_files
from experthub.hub.recipes.lock_file import Lock
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.registry import registry
from experthub.hub.registry.expert import Reference, make_source_absolute
from experthub.hub.registry.file_patterns import list_file_patterns
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.transfer import describe
from experthub.hub.transfer.oci_image import make_image, write_archive
from experthub.hub.transfer.remotes import _http, hf
from experthub.hub.transfer.remotes._hf_files import HfSource
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as some
from safetensors.torch import save

pytestmark = pytest.mark.attack
EXAMPLES = int(os.environ.get("HUB_EXAMPLES", "300"))
SECONDS = 20.0  # until a reader counts as one that hangs; the slowest take less than one
HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"

# Documents and their damage

FRAGMENTS = [
    *(b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system ", b"!x ", b"---\n", b"...\n"),
    *(b"? ", b"- ", b": ", b"\n", b"\n  ", b"\t", b"{", b"}", b"[", b"]", b",", b"'", b'"', b"#"),
    *(b"|\n", b">-\n", b"%YAML 9.9\n", b"\\", b"\\u0000", b"\\ud800", b'"\\x00"', b'"\\uD83D"'),
    *(b"[" * 150, b'{"a":' * 150, b"- " * 150, b"[" * 5000, b'{"a":' * 2000, b"(" * 2000),
    *(b"\0", b"\x1b[2J", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x85"),
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"0o17", b".nan", b"-.inf", b"1_0", b"true", b"null"),
    *(b"9" * 19, b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"-1", b"~", b"2026-01-01", b"1:30"),
    *(b"../../x", b"/etc/passwd", b"file:", b"hf:a/b@", b"pypi:a==1#b", b"sha256:", b"@1", b"."),
    *(b"(a+)+$", b"(", b"(?P<idx>x)", b"x{9999999999}", b".*" * 12, b"[[:alpha:]", b"\\1", b"|"),
    *(b"merge: {method: linear}", b"{expert: x, weight: .nan}", b"version: 2", b"__metadata__"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "X", "\0", "\ud800", "\x1b[2J", "\u202e", "a" * 5000),
    *("../../x", "/etc/passwd", ".", "file:", "hf:a/b", DIGEST, HEX, "name@1", "x@" + "9" * 5000),
    *("(", "(a+)+$", "([a-z.]+)+X", "(?P<idx>x)", "x{9999999999}", "(" * 2000, ".*" * 12 + "X"),
    *([], {}, [[]], [None], ["x", "x"], [1, "x"], {"": 1}, {"a": {"b": []}}, {"\ud800": 1}),
    *(list(range(300)), {str(i): i for i in range(300)}, json.loads("[" * 120 + "]" * 120)),
    *("transformers.x", "evil", "LORA", "linear", "phatgoose", "float32", "file", "directory"),
]
# A change is one number, which is cheap to draw and to shrink: how, where, how much, and with what.
CHANGE = some.integers(0, (1 << 52) - 1)
WORD = re.compile(rb"[\w.:/@+-]+")


def parts(change: int) -> tuple[int, int, int, int]:
    """Split a mutation into its kind, its position, its length and its content."""
    return change % 8, (change >> 3) % (1 << 16), (change >> 19) % (1 << 16), change >> 35


def piece_of(number: int) -> bytes:
    """A few bytes, a letter of any kind, or one of the fragments."""
    if number % 4 == 0:
        return number.to_bytes(3, "little")
    if number % 4 == 1:
        return chr(number % 0x110000).encode("utf-8", "surrogatepass")
    return FRAGMENTS[(number >> 2) % len(FRAGMENTS)]


def damaged(content: bytes, changes: list[int]) -> bytes:
    """The bytes after a few changes."""
    for how, place, amount, number in map(parts, changes):
        size = max(len(content), 1)
        start = place % size
        stop = start + 1 + amount % max(size // 4, 1)
        if how == 0 and content:
            flipped = content[start] ^ (1 << amount % 8)
            content = content[:start] + bytes([flipped]) + content[start + 1 :]
        elif how == 1:
            content = content[:start] + (b"" if amount % 2 else content[stop:])
        elif how == 2:
            content = content[:stop] + content[start:]
        elif how < 5:
            content = content[:start] + piece_of(number) + content[start:]
        elif how < 7 and (words := list(WORD.finditer(content))):
            word = words[place % len(words)]
            content = content[: word.start()] + piece_of(number) + content[word.end() :]
        else:
            lines = content.split(b"\n")
            one, other = place % len(lines), amount % len(lines)
            lines[one], lines[other] = lines[other], lines[one]
            content = b"\n".join(lines)
    return content


def slots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree, as its container and the key there."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        node = left.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node))
        found += [(node, key) for key, _ in items]
        left += [inner for _, inner in items if isinstance(inner, dict | list)]
    return found


def rebuilt(value: Any, changes: list[int]) -> Any:
    """The tree after a few changes."""
    whole = {"": deepcopy(value)}
    for how, place, amount, number in map(parts, changes):
        places = slots(whole)
        node, key = places[place % len(places)]
        other, there = places[amount % len(places)]
        new = deepcopy(VALUES[number % len(VALUES)])
        inside = node is not whole
        if how == 0 and inside:
            del node[key]
        elif how == 1 and inside and isinstance(node, dict):
            node[str(new)[:80] if amount % 2 else f"{key}x"] = node.pop(key)
        elif how == 2 and isinstance(node, list):
            node.append(deepcopy(node[key]))
        elif how == 3:
            node[key] = [node[key]] if amount % 2 else {"x": node[key]}
        elif how == 4 and len(places) < 1000:
            node[key] = deepcopy(other[there])
        else:
            node[key] = new
    return whole[""]


@dataclass
class Reader:
    """A reader with valid documents: texts, or trees that are written as JSON."""

    read: Callable[[bytes], object]
    texts: list[bytes]
    trees: list[Any]

    def document(self, numbers: list[int]) -> bytes:
        """One that was damaged as the numbers say: its tree, its text, both, or none of it."""
        first, *changes = numbers
        kind, first = first % 4, first >> 2
        if kind < 3 and self.trees:
            tree = rebuilt(self.trees[first % len(self.trees)], changes[:2] if kind else changes)
            return damaged(as_json(tree), changes[2:] if kind == 1 else [])
        texts = [*self.texts, *map(as_json, self.trees)]
        return damaged(texts[first % len(texts)], changes)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# What nobody may do meanwhile

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Of each call: which arguments are paths that it changes, and where their folder's handle is.
CALLS = {
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)],
    "os.rmdir": [(0, 1)],
    "os.link": [(1, 3)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, 9)],
    "os.chmod": [(0, 2)],
}
SPAWNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_watched: list[tuple[Path, list[str]]] = []


def _audit(event: str, given: tuple[Any, ...]) -> None:
    """Note what is changed outside the folder that is watched; hooks cannot be taken away."""
    if not _watched:
        return
    folder, found = _watched[-1]
    if event in SPAWNS:
        found.append(f"{event} {given}")
    places = CALLS.get(event, [])
    if event == "open" and isinstance(given[2], int) and given[2] & WRITING:
        places = [(0, 9)]
    for which, handle in places:
        if isinstance(given[which], int):  # a file that was opened before
            continue
        near = given[handle] if handle < len(given) else -1
        root = Path(f"/proc/self/fd/{near}").readlink() if near not in (None, -1) else Path.cwd()
        path = root / os.fsdecode(given[which])
        if folder not in path.parents or ".." in path.parts:
            found.append(f"{event} {path}")


sys.addaudithook(_audit)


class Hangs(BaseException):
    """A reader that takes too long."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail when the block changes anything outside the folder, starts a program, or hangs."""

    def stop(*_: object) -> None:
        raise Hangs

    found: list[str] = []
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watched.append((folder, found))
    try:
        yield
    finally:
        _watched.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not found


# The readers

READERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Reader]] = {}


def reader(make: Callable[[Path, pytest.MonkeyPatch], Reader]) -> Any:
    READERS[make.__name__] = make
    return make


def from_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def from_bytes(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return from_bytes


RECIPES: list[Any] = [
    {
        "base": "all-minilm-l6-v2",
        "experts": ["intents-minilm"],
        "merge": {"method": "atlas", "granularity": "block", "steps": 5},
        "data": {"tasks": ["bigbench:ruin_names"], "labels": True, "shots": 4, "limit": 9},
    },
    {
        "version": 1,
        "base": "smollm2-135m-instruct",
        "experts": ["sentiment", {"expert": "./x", "weight": 0.5, "as": "y"}, "hf:a/b@main"],
        "merge": {"method": "task_arithmetic", "scale": 0.3},
        "targets": r"model\.layers\.\d+\..*",
        "dtype": "bfloat16",
        "seed": 3,
    },
    {
        "base": "./base",
        "experts": [
            f"sentiment@{DIGEST}",
            {"merge": {"method": "linear"}, "experts": ["x@2", "file:y"], "rank": 4, "as": "m"},
        ],
        "route": {"method": "phatgoose", "combine": "parameters"},
        "allow_base_mismatch": True,
    },
]
EXPERT: dict[str, Any] = {
    "name": "sentiment",
    "version": 2,
    "kind": "lora",
    "base": "smollm2",
    "sources": ["file:experts/sentiment", "hf:a/b@main"],
    "digest": DIGEST,
    "task": "bigbench:snarks",
    "license": "apache-2.0",
    "description": "Sarcasm, or not.",
    "tags": ["a", "b"],
    "training": {"steps": 50, "rank": 4, "nested": {"a": [1, 2.5, None]}},
    "scores": [
        {"task": "t", "split": "test", "metric": "accuracy", "n": 9, "base": 0.1, "expert": 0.9}
        | {"delta_ci95": [0.1, 0.2]}
    ],
}
BASE = {"sources": ["pypi:a==1#b/c.gguf"], "sha256": HEX, "fingerprint": DIGEST, "aka": ["A/B"]}


@reader
def recipe(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    texts = [dump(tree).encode() for tree in RECIPES]
    return Reader(from_file(folder / "recipe.yaml", Recipe.read), texts, RECIPES)


@reader
def registry_file(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """Make a reader of a registry file, without other registries, which take time."""
    patch.setattr(registry, "__file__", str(folder / "nothing.py"))
    tree = {"version": 1, "bases": {"smollm2": BASE}, "experts": [EXPERT, EXPERT | {"version": 3}]}

    def read(path: Path) -> object:
        known = Registry.read(path)
        return (
            known.search(["a"]),
            known.list_bases(),
            [known.find_expert(Reference.parse(e.name)) for e in known.list_experts()],
        )

    return Reader(from_file(folder / "r.yaml", read), [dump(tree).encode()], [tree])


@reader
def lock(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    expert = {
        "expert": "x@1",
        "digest": DIGEST,
        "sources": ["file:x"],
        "task": "a:b",
        "weight": 0.5,
    }
    nested = {"merge": {"method": "linear"}, "experts": [expert, expert], "rank": 3, "as": "m"}
    tree = {
        "version": 1,
        "recipe": DIGEST,
        "composition": DIGEST,
        "base": {"name": "b", "fingerprint": DIGEST, "sources": ["hf:a/b"], "sha256": HEX},
        "experts": [expert, nested],
        "merge": {"method": "linear"},
        "dtype": "float32",
        "seed": 0,
        "allow_base_mismatch": False,
    }
    read = from_file(folder / "recipe.lock.yaml", lambda path: Lock.read(path).record())
    return Reader(read, [dump(tree).encode()], [tree])


FILES = {
    "adapter_config.json": {"sha256": HEX, "size": 3},
    "adapter_model.safetensors": {"sha256": HEX[::-1], "size": 5},
}
IDENTITY = {"schema": 1, "kind": "lora", "base_fingerprint": DIGEST, "files": FILES}


@reader
def identity(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """An object of the store that is called an expert."""
    store = Store(folder / "home")

    def read(content: bytes) -> object:
        sha256 = hashlib.sha256(content).hexdigest()
        path = store.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        try:
            return store.find_identity(f"sha256:{sha256}")
        finally:
            path.unlink()

    return Reader(read, [], [IDENTITY])


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTER = save(
    {f"{MODULE}.lora_A.weight": torch.ones(2, 4), f"{MODULE}.lora_B.weight": torch.ones(4, 2)}
)
CONFIGS: list[Any] = [
    {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        "base_model_name_or_path": "a/b",
        "auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.x"},
        "init_lora_weights": True,
        "modules_to_save": None,
    },
    {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16.0,
        "use_rslora": True,
        "target_modules": r".*\.(q|v)_proj",
        "exclude_modules": ["lm_head"],
        "rank_pattern": {r"layers\.0\..*q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "megatron_core": "megatron.core",
    },
    {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["layers"],
        "fan_in_fan_out": True,
    },
]


@reader
def adapter_config(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(ADAPTER)
    patch.setattr(patterns, "SECONDS", 0.05)
    config = folder / "adapter_config.json"
    return Reader(from_file(config, lambda path: read_adapter(path, weights, "x")), [], CONFIGS)


@reader
def safetensors_header(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """Whole files, and headers whose length is right, so that what is in them is looked at."""
    header = json.loads(ADAPTER[8 : 8 + int.from_bytes(ADAPTER[:8], "little")])
    data = ADAPTER[8 + int.from_bytes(ADAPTER[:8], "little") :]
    path = folder / "x.safetensors"

    def read(content: bytes) -> object:
        if content[:1] in (b"{", b"["):
            content = len(content).to_bytes(8, "little") + content + data
        path.write_bytes(content)
        found = read_header(path)
        assert sum(info.bytes for info in found.values()) <= len(content)
        return found

    return Reader(read, [ADAPTER], [header, header | {"__metadata__": {"format": "pt"}}])


@reader
def soft_prompt(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """Headers of soft prompts and of prefixes, whose length is right."""
    path = folder / PROMPT
    forms = [{"prompt": torch.ones(4, 24)}]
    forms.append({name: torch.ones(2, 2, 3, 4) for name in ("keys", "values")})
    whole = [save(form) for form in forms]
    start = [int.from_bytes(one[:8], "little") + 8 for one in whole]
    data = max((one[at:] for one, at in zip(whole, start, strict=True)), key=len)

    def read(content: bytes) -> object:
        if content[:1] in (b"{", b"["):
            content = len(content).to_bytes(8, "little") + content + data
        path.write_bytes(content)
        return read_prompt(path)

    headers = [json.loads(one[8:at]) for one, at in zip(whole, start, strict=True)]
    return Reader(read, whole, headers)


@reader
def shard_index(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """Make a reader of the index of a task vector in two files."""
    places = {"a.weight": SHARD.format(1, 2), "b.weight": SHARD.format(2, 2)}
    for name, file in places.items():
        (folder / file).write_bytes(save({name: torch.ones(2)}))
    trees = [{"metadata": {"total_size": 16}, "weight_map": places}]
    return Reader(from_file(folder / SHARD_INDEX, lambda path: find_files(path.parent)), [], trees)


@reader
def coefficients(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """coefficients.json, beside the numbers that it describes."""
    (folder / COEFFICIENTS).write_bytes(save({"coefficients": torch.ones(2, 3)}))
    record = {
        "schema": 1,
        "method": "adamerging",
        "options": {"granularity": "layer", "steps": 3, "seed": 0},
        "granularity": "layer",
        "combine": "outputs",
        "experts": [{"expert": name, "digest": DIGEST} for name in ("one", "two")],
        "blocks": ["a.weight", "b.weight", "c.weight"],
        "objective": "entropy",
        "data": DIGEST,
        "seed": 0,
        "history": [1.0, 0.5, 0.25],
    }

    def read(path: Path) -> object:
        return read_coefficients(path, folder / COEFFICIENTS)

    return Reader(from_file(folder / COEFFICIENTS_JSON, read), [], [record])


@reader
def description(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """expert.json, up to the entry that would be registered."""
    mine = folder / "expert"
    mine.mkdir()
    (mine / "adapter_model.safetensors").write_bytes(ADAPTER)
    (mine / "adapter_config.json").write_bytes(as_json(CONFIGS[0]))
    patch.setattr(Store, "take", lambda *_, **__: None)
    patch.setattr(describe, "register", lambda *_: None)
    tree = EXPERT | {"identity": read_folder(mine).record()}

    def read(path: Path) -> object:
        return describe.add_folder(mine, "x", Session(Registry(()), Store(folder / "home")))

    return Reader(from_file(mine / "expert.json", read), [], [tree, {"identity": tree["identity"]}])


def shared(folder: Path) -> Path:
    """An archive with one expert."""
    mine, store = folder / "expert", Store(folder / "home")
    mine.mkdir()
    (mine / "adapter_model.safetensors").write_bytes(ADAPTER)
    (mine / "adapter_config.json").write_bytes(as_json(CONFIGS[0]))
    expert = describe.add_folder(mine, "x", Session(Registry(()), store), base="b")
    write_archive([make_image(expert, store)], folder / "x.tar")
    return folder / "x.tar"


def unpacked(place: Path, folder: Path) -> object:
    """Every expert of an archive or shared folder, unpacked into an empty folder."""
    target = folder / "out"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    layout = OciLayout.read(place)
    found = {name: layout.unpack(layout.find(name), target) for name in layout.experts}
    assert all(matches_any(path.name, list_file_patterns()) for path in target.iterdir())
    return found


@reader
def archive(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """A tar archive with experts."""
    path = shared(folder)
    text = path.read_bytes()
    return Reader(from_file(path, lambda place: unpacked(place, folder)), [text], [])


@reader
def shared_index(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """index.json of a shared folder."""
    place, path = folder / "shared", shared(folder)
    for name, (start, size) in list_members(path).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(path.read_bytes()[start : start + size])
    index = place / "index.json"
    tree = json.loads(index.read_text())
    return Reader(from_file(index, lambda _: unpacked(place, folder)), [], [tree])


@reader
def model_config(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """config.json of a base, and the index of its shards."""
    shard = "model-00001-of-00001.safetensors"
    config = {"architectures": ["X"], "tie_word_embeddings": True, "a": {"b": [1, {"c": 2}]}}
    index = {"metadata": {"total_size": 64}, "weight_map": {"a.weight": shard}}
    mine = folder / "base"
    mine.mkdir()
    (mine / shard).write_bytes(ADAPTER)

    def read(content: bytes) -> object:
        listed = b"weight_map" in content
        (mine / "config.json").write_bytes(as_json(config) if listed else content)
        (mine / "model.safetensors.index.json").write_bytes(content if listed else as_json(index))
        base = bases.read(mine, "b")
        return base.is_causal, base.is_encoder

    return Reader(read, [], [config, config, index])


@reader
def reference(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """References, and the sources of a model hub; a repository never leaves its folder."""
    texts = ["name", "name@2", f"name@{DIGEST}", "./a/b", "../x", "/x", "file:a", "hf:a/b@main"]
    texts += ["hf:org/name@refs/pr/1", f"hf:a/b@{HEX[:40]}", "pypi:a==1#b/c.gguf", "hf:a"]

    def read(content: bytes) -> object:
        text = content.decode("utf-8", "surrogatepass" if len(content) % 2 else "surrogateescape")
        problems = []
        for parse in (Reference.parse, lambda t: make_source_absolute(t, folder), HfSource.parse):
            try:
                parse(text)
            except HubError as error:
                problems.append(error)
        if len(problems) == 3:
            raise problems[0]
        if text.startswith("hf:") and len(problems) == 0:
            place = HfSource.parse(text)
            mine = folder / place.repository.replace("/", "--")
            kept = mine / "refs" / place.revision.replace("/", "--")
            assert mine.parent == folder and kept.parent.parent == mine
            assert ".." not in kept.parts and len(os.fsencode(kept.name)) < 250
        return text

    def tried(content: bytes) -> object:
        try:
            return read(content)
        except UnicodeDecodeError:  # no text at all
            raise HubError("not text") from None

    return Reader(tried, [text.encode() for text in texts], [])


CONTENT = {"adapter_config.json": as_json(CONFIGS[0]), "adapter_model.safetensors": ADAPTER}


def tree_rows() -> list[dict[str, Any]]:
    rows = []
    for name, content in CONTENT.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        row: dict[str, Any] = {"type": "file", "oid": blob, "size": len(content), "path": name}
        if name.endswith("safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        rows.append(row)
    return [*rows, {"type": "directory", "oid": "0" * 40, "size": 0, "path": "sub"}]


@reader
def hub_answers(folder: Path, patch: pytest.MonkeyPatch) -> Reader:
    """Make a reader of a model hub's answers: the commit, the files and the next page."""
    commit, url = "1" * 40, "http://hub.test"
    home = folder / "home"
    answers: dict[str, bytes] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        assert request.url.host == "hub.test", "the token goes to another host"
        if "/revision/" in path:
            return answer(answers["revision"])
        if "/tree/" in path:
            if b"cursor" in request.url.query:
                return answer(b"[]")
            link = [(b"Link", answers["link"])] if answers["link"] else []
            return answer(answers["tree"], headers=link)
        content = CONTENT.get(path.rpartition("/")[2])
        return answer(content or b"", 200 if content else 404)

    def answer(content: bytes, status: int = 200, **more: Any) -> httpx.Response:
        return httpx.Response(status, stream=httpx.ByteStream(content), **more)

    real = httpx.Client

    def client(**options: Any) -> httpx.Client:
        return real(transport=httpx.MockTransport(handle), **options)

    for name, value in {"HF_ENDPOINT": url, "HF_TOKEN": "hf_x", "HF_HOME": str(folder)}.items():
        patch.setenv(name, value)
    patch.setattr(httpx, "Client", client)
    patch.setattr(os, "fsync", lambda _: None)
    patch.setattr(_http, "TRIES", 1)
    patch.setattr(hf, "AT_ONCE", 1)

    def read(content: bytes) -> object:
        answers.update(revision=as_json({"sha": commit}), tree=as_json(tree_rows()), link=b"")
        if content.startswith((b"<", b"/", b"?")):
            answers["link"] = content.replace(b"\n", b" ").replace(b"\r", b" ").replace(b"\0", b"")
        else:
            answers["revision" if b'"sha"' in content else "tree"] = content
        try:
            got, _ = hf.fetch("hf:a/b", home / "hf", list_file_patterns())
            return {path.name for path in got.iterdir()} <= {
                *list_file_patterns(),
                MANIFEST,
            } or pytest.fail("more")
        finally:
            shutil.rmtree(home, ignore_errors=True)

    link = b'</api/models/a/b/tree/x?cursor=1>; rel="next"'
    revision = {"sha": commit, "id": "a/b"}
    return Reader(read, [link], [tree_rows(), tree_rows(), tree_rows(), revision])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", READERS)
def test_a_value_or_an_error(
    name: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("HUB_HOME", str(folder / "home"))
    made = READERS[name](folder, monkeypatch)
    for sound in [*made.texts, *map(as_json, made.trees)]:
        made.read(sound)  # imports what it imports, too
    count: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(some.lists(CHANGE, min_size=2, max_size=4))
    def check(numbers: list[int]) -> None:
        content = made.document(numbers)
        note(f"the document is {content[:2000]!r}")
        with watched(folder):
            try:
                made.read(content)
            except HubError as error:
                assert error.message and len(error.message) < 20_000
                count["refused"] += 1
            else:
                count["taken"] += 1

    check()
    print(f"{name}: {count.total()} documents, {count['taken']} taken, {count['refused']} refused")
    assert count["taken"] > EXAMPLES // 100 and count["refused"] > EXAMPLES // 10


def test_the_watch_notices(tmp_path: Path) -> None:
    """The watch reports what the readers must not do."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with watched(inside):
        (inside / "x").write_text("x")
        (inside / "x").unlink()
    handle = os.open(tmp_path, os.O_RDONLY)
    acts: list[Callable[[], object]] = [
        lambda: (tmp_path / "x").write_text("x"),
        lambda: (tmp_path / "x").rename(tmp_path / "y"),
        lambda: (tmp_path / "y").rename(inside / "y"),
        lambda: os.mkdir("below", dir_fd=handle),
        lambda: (inside / ".." / "z").touch(),
        lambda: (tmp_path / "l").symlink_to(inside),
        lambda: os.system("true"),
    ]
    for act in acts:
        with pytest.raises(AssertionError, match=r"assert not \["), watched(inside):
            act()
    os.close(handle)


def test_the_watch_ends_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.05)
    with pytest.raises(Hangs), watched(tmp_path):
        while True:
            pass
