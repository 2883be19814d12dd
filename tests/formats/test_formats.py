"""Adapters that peft wrote mean what they mean in peft; headers never surprise their reader."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_kinds
import pytest
import torch
from conftest import logits
from experthub import hub
from experthub.hub.errors import IntegrityError
from experthub.hub.files.digests import read_chunks
from experthub.hub.files.spelling import MAX_LISTED, suggest_name
from experthub.hub.formats.adapter import Adapted, read_adapter
from experthub.hub.formats.lora_config import check_config
from experthub.hub.formats.router import RouterRecord
from experthub.hub.formats.safetensors_header import check_finite, read_header
from experthub.hub.formats.skills import SkillsRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"


def peft_adapter(base: Path, folder: Path, **config: Any) -> Any:
    """A random adapter, made, drawn and saved by peft; returns the adapted model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


def adapted_modules(folder: Path) -> dict[str, Adapted]:
    weights = folder / "adapter_model.safetensors"
    return {a.module: a for a in read_adapter(folder / "adapter_config.json", weights, "x")}


# Configuration, and by module's ending the scale that it means; the rest has the first one.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "plain": ({"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}, {"": 1.0}),
    "odd_alpha": ({"r": 3, "lora_alpha": 7, "target_modules": ["up_proj"]}, {"": 7 / 3}),
    "defaults": ({"target_modules": ["q_proj"]}, {"": 1.0}),
    "rslora": (
        {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"": 7 / math.sqrt(5)},
    ),
    "rank_pattern": (
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        },
        {"": 6 / 4, V: 6 / 2, "1.mlp.up_proj": 6 / 3},
    ),
    "alpha_pattern": (
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "alpha_pattern": {r"model\.layers\.0\..*": 10, "v_proj": 3},
        },
        {"": 6 / 4, V: 3 / 4, f"0.{V}": 10 / 4, f"0.{Q}": 10 / 4, f"0.{UP}": 10 / 4},
    ),
    "both_patterns_and_rslora": (
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 6, "proj": 2},
            "alpha_pattern": {"q_proj": 5.5},
        },
        {"": 6 / math.sqrt(4), Q: 5.5 / math.sqrt(6)},
    ),
    "anchored_pattern": (
        # `^` in a pattern binds to the whole path, as in peft.
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "layers.1": 8},
        },
        {"": 1.0, f"0.{Q}": 2.0},
    ),
    "regular_expression": (
        {"r": 2, "lora_alpha": 3, "target_modules": r".*layers\.1\..*(q|up)_proj"},
        {"": 3 / 2},
    ),
    "all_linear": ({"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}, {"": 3 / 2}),
    "excluded": (
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj"],
        },
        {"": 3 / 2},
    ),
    "excluded_by_expression": (
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": r".*\.1\..*v_proj",
        },
        {"": 3 / 2},
    ),
    "layers": (
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"": 3 / 2},
    ),
    "one_layer_by_pattern": (
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
        },
        {"": 3 / 2},
    ),
    "no_layers_means_all": (
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "layers_to_transform": []},
        {"": 3 / 2},
    ),
    "whole_names_ignore_layers": (
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": [f"model.layers.0.{Q}", "v_proj"],
            "layers_to_transform": [1],
        },
        {"": 3 / 2},
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_peft_adapter_is_read_exactly(name: str, tmp_path: Path, base_folder: Path) -> None:
    """The same modules, the same scales to the last bit, the same logits."""
    config, scales = CONFIGURATIONS[name]
    folder = tmp_path / "expert"
    adapted = peft_adapter(base_folder, folder, **config)
    found = adapted_modules(folder)
    theirs = {
        n.removeprefix("base_model.model."): m.scaling["default"]
        for n, m in adapted.named_modules()
        if isinstance(getattr(m, "scaling", None), dict)
    }
    assert {module: a.scale for module, a in found.items()} == theirs
    for module, a in found.items():
        ending = max((e for e in scales if module.endswith(e)), key=len)
        assert a.scale == scales[ending], module
    recipe = {"base": str(base_folder), "experts": [str(folder)], "merge": {"method": "linear"}}
    composed = hub.compose(recipe).model
    torch.testing.assert_close(logits(composed), logits(adapted), atol=1e-3, rtol=1e-4)
    plain = logits(adapted.unload())
    assert not torch.allclose(logits(composed), plain, atol=1e-2), "the adapter does nothing"


@pytest.mark.parametrize("way", ["merge", "route"])
def test_fan_in_fan_out_is_that_of_the_module_as_in_peft(
    way: str, base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    """A square weight would take the transposed change."""
    method = {"method": "linear" if way == "merge" else "uniform"}
    found = []
    for stated in (False, True):
        folder = expert_folder(1, targets=("q_proj",), fan_in_fan_out=stated)
        recipe = {"base": str(base_folder), "experts": [str(folder)], way: method}
        found.append(logits(hub.compose(recipe).model))
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


@pytest.mark.parametrize("way", ["merge", "route"])
def test_an_adapter_of_conv1d_and_linear_modules_has_one_fan_in_fan_out(
    way: str, tmp_path: Path
) -> None:
    """peft writes the value of the module that it adapted last."""
    kind = peft_kinds.make_base("gpt2", tmp_path / "base")
    more = {"target_modules": ["c_attn", "c_proj", "lm_head"]}
    made = peft_kinds.make_adapter("LoRA", kind, tmp_path / "adapter", "gpt2", **more)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is False
    method = {"method": "linear" if way == "merge" else "uniform"}
    recipe = {"base": str(kind), "experts": [str(tmp_path / "adapter")], way: method}
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        right = made(input_ids=ids).logits
        got = hub.compose(recipe).model(input_ids=ids).logits
    assert float((got - right).abs().max()) < 1e-5 * float(right.abs().max())


def test_bfloat16_adapter_is_widened_exactly(
    base_folder: Path, base_model: Any, expert_folder: Callable[..., Path]
) -> None:
    folder = expert_folder(1, targets=("q_proj",))
    path = folder / "adapter_model.safetensors"
    half = {n: t.bfloat16() for n, t in load_file(path).items()}
    save_file(half, path)
    recipe = {"base": str(base_folder), "experts": [str(folder)], "merge": {"method": "linear"}}
    composed = hub.compose(recipe).model
    name = f"model.layers.0.{Q}"
    a, b = (half[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    expected = base_model.get_submodule(name).weight.double() + 2 * b @ a
    found = composed.get_submodule(name).weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)


def test_header_of_an_odd_length(base_folder: Path, expert_folder: Callable[..., Path]) -> None:
    """Nothing in the format aligns the tensors; safetensors' own writer only pads its headers."""
    folder = expert_folder(1)
    recipe = {"base": str(base_folder), "experts": [str(folder)], "merge": {"method": "linear"}}
    expected = logits(hub.compose(recipe).model)
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert len(header) % 2 == 1 and len(load_file(path)) == 28
    assert torch.equal(logits(hub.compose(recipe).model), expected)


# What peft itself writes beside the factors of a LoRA, and the ends of the tensors' names.
DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "saved_modules": ({"modules_to_save": ["norm"]}, "norm.weight"),
    "trained_tokens": ({"trainable_token_indices": [3, 4]}, "trainable_tokens_delta"),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_parts_are_used_and_refused_by_name_if_they_are_missing(
    name: str, tmp_path: Path, base_folder: Path
) -> None:
    changes, end = DENSE[name]
    (key,) = changes
    folder = tmp_path / "x"
    adapted = peft_adapter(base_folder, folder, r=2, target_modules=["q_proj"], **changes)
    recipe = {"base": str(base_folder), "experts": [str(folder)], "merge": {"method": "linear"}}
    ids = torch.tensor([[3, 4, 130, 9, 3, 33, 41]])
    with torch.no_grad():
        ours, theirs = hub.compose(recipe).model(input_ids=ids).logits, adapted(input_ids=ids)
    torch.testing.assert_close(ours, theirs.logits, atol=2e-5, rtol=2e-5)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    with pytest.raises(IntegrityError, match=f"{key} is .*holds no weights for it") as caught:
        hub.compose(recipe)
    assert "complete" in caught.value.hint


def test_refused_even_when_the_configuration_denies_it(tmp_path: Path, base_folder: Path) -> None:
    """DoRA's tensors under a configuration that says plain LoRA."""
    peft_adapter(base_folder, tmp_path / "x", r=2, target_modules=["q_proj"], use_dora=True)
    path = tmp_path / "x" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(IntegrityError, match=r"lora_magnitude_vector.* is not a part of a plain"):
        adapted_modules(tmp_path / "x")


@pytest.mark.parametrize("key", ["usedora", "new_in_peft_9"])
def test_the_hint_for_an_unknown_key_names_no_other_key(key: str) -> None:
    with pytest.raises(IntegrityError, match=f"unknown key '{key}'") as caught:
        check_config({"peft_type": "LORA", key: 1})
    assert "did you mean" not in caught.value.hint and "upgrade experthub" in caught.value.hint


def test_a_long_list_of_words_is_no_hint() -> None:
    words = [f"model.layers.{number}" for number in range(MAX_LISTED)]
    assert suggest_name("x", words).startswith("use one of ")
    assert suggest_name("x", [*words, "one.more"]) == ""
    assert suggest_name("model.layer.3", [*words, "one.more"]) == "did you mean 'model.layers.3'?"


def test_chunks_end_where_a_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        assert b"".join(read_chunks(file, 2, 5)) == b"23456"
        assert b"".join(read_chunks(file, 8, 1 << 30)) == b"89"


# The header reader, against the safetensors library.

CALM = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
VALID = save(
    {
        "model.a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "model.b.weight": torch.ones(4, dtype=torch.bfloat16),
        "model.c": torch.zeros(0, 2),
        "model.d": torch.tensor(7, dtype=torch.int64),
    },
    {"format": "pt"},
)
LENGTH = int.from_bytes(VALID[:8], "little")
HEADER = json.loads(VALID[8 : 8 + LENGTH])
DATA = VALID[8 + LENGTH :]


def with_header(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def agree(content: bytes) -> bool:
    """Return whether our reader accepts a file; safetensors must then read the same tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            found = read_header(path)
        except IntegrityError as error:
            assert error.hint
            return False
        with safe_open(path, framework="pt") as theirs:
            names = list(theirs.keys())
            assert sorted(found) == sorted(names)
            for name in names:
                part = theirs.get_slice(name)
                info = found[name]
                assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())
                tensor = theirs.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                assert content[info.begin : info.end] == bytes(tensor.tolist())
        return True


def test_valid_file_is_taken() -> None:
    assert agree(VALID)
    assert agree(with_header(HEADER))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 19280, 640 + 65536])
def test_a_length_that_starts_as_a_pickle_does(length: int) -> None:
    """The first bytes of 640, little-endian, are those of a pickle of protocol 2."""
    assert agree(with_header(json.dumps(HEADER).encode().ljust(length)))


@settings(CALM, max_examples=150)
@given(st.data())
def test_flipped_bytes(data: st.DataObject) -> None:
    content = bytearray(VALID)
    places = st.integers(0, len(VALID) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    agree(bytes(content))


@settings(CALM, max_examples=60)
@given(st.integers(0, len(VALID) - 1), st.binary(max_size=12))
def test_cut_and_padded(end: int, tail: bytes) -> None:
    assert not agree(VALID[:end])
    assert agree(VALID + tail) is (tail == b"")


@settings(CALM, max_examples=60)
@given(st.binary(max_size=80))
def test_noise(content: bytes) -> None:
    agree(content)
    agree(len(content).to_bytes(8, "little") + content)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "U16", "C64", "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@settings(CALM, max_examples=200)
@given(
    st.sampled_from([*HEADER, "new", "../../x", ""]),
    st.sampled_from(["", "dtype", "shape", "data_offsets", "more"]),
    VALUES,
)
def test_changed_fields(name: str, field: str, value: Any) -> None:
    header = json.loads(json.dumps(HEADER))
    if field and isinstance(header.get(name), dict):
        header[name][field] = value
    else:
        header[name] = value
    agree(with_header(header))


# Files that one reader or the other is known to take, or that once broke ours.
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no_header": b"\0" * 8,
    "header_beyond_the_file": (1 << 62).to_bytes(8, "little") + b"{}",
    "deep": with_header(b"[" * 100_000),
    "deep_metadata": with_header(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
    "list": with_header([]),
    "repeated_name": with_header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "path_as_a_name": with_header(
        {"../../x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
    ),
    "shape_of_a_text": with_header(
        {"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "shape_of_a_mapping": with_header(
        {"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "true_as_a_size": with_header(
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "negative_sizes": with_header(
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "overlap": with_header(
        {n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"}, b"\0\0"
    ),
    "hole": with_header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"\0\0"),
    "overflow": with_header(
        {"a": {"dtype": "F32", "shape": [2**32, 2**32, 0], "data_offsets": [0, 0]}}, b""
    ),
    "metadata_number": with_header({"__metadata__": {"a": 1}}, b""),
    "metadata_list": with_header({"__metadata__": []}, b""),
    "surrogate": with_header(b'{"__metadata__":{"a":"\\ud800"}}', b""),
    "not_a_number": with_header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"b":NaN}}', b"\0"
    ),
    "byte_order_mark": with_header(b"\xef\xbb\xbf" + json.dumps(HEADER).encode()),
    "utf_16": with_header(json.dumps(HEADER).encode("utf-16")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused(name: str) -> None:
    assert not agree(HOSTILE[name])


def test_what_safetensors_refuses_is_refused() -> None:
    """The table above is no tautology: the library itself refuses most of it."""
    refused = 0
    for content in HOSTILE.values():
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "x.safetensors"
                path.write_bytes(content)
                safe_open(path, framework="pt").__enter__()
        except (SafetensorError, OSError, ValueError):
            refused += 1
    assert refused >= len(HOSTILE) - 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_float_is_checked(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    """The largest finite numbers and subnormals are accepted; for float64 those of float32."""
    path = tmp_path / "x.safetensors"
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    sound = torch.tensor([info.max, info.min, info.tiny, -0.0, info.smallest_normal], dtype=dtype)
    save_file({"a": sound, "b": torch.tensor([1, 2])}, path)
    check_finite(path, read_header(path))
    sound[3] = value
    save_file({"a": sound, "b": torch.tensor([1, 2])}, path)
    with pytest.raises(IntegrityError, match="tensor a holds NaN or infinity"):
        check_finite(path, read_header(path))


@pytest.mark.parametrize(
    ("record", "name"), [(SkillsRecord, "skills.json"), (RouterRecord, "router.json")]
)
def test_the_docs_name_every_key(record: type[BaseModel], name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
    rows = page.partition(f"| key of `{name}` |")[2].partition("\n\n")[0].splitlines()[2:]
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert keys == [info.alias or own for own, info in record.model_fields.items()]
