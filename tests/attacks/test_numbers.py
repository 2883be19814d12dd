"""Numbers that overflow, vanish or are none: refused with a place, never written or printed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, make_expert, run_hub
from experthub.hub.errors import IntegrityError
from experthub.hub.files.digests import canonical_json, encode_json
from experthub.hub.files.json_files import read_json
from experthub.hub.store.store import Store
from kinds_of_folders import MAKERS
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.attack
Make = Callable[..., Path]
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULE = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{MODULE}.lora_{x}.weight" for x in "AB")
NAN = float("nan")


def parse_strictly(text: str) -> Any:
    """Parse JSON as other programs do: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def adapter(folder: Path, a: torch.Tensor, b: torch.Tensor, alpha: float, **config: Any) -> Path:
    """Write an adapter of one module with these factors."""
    folder.mkdir()
    save_file({A: a, B: b}, folder / ADAPTER)
    settings = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": alpha, "bias": "none"}
    settings |= {"target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}
    (folder / CONFIG).write_text(json.dumps(settings | config))
    return folder


def filled(value: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((4, 32), 1.0, dtype=dtype), torch.full((32, 4), value, dtype=dtype)


# The value in B, its dtype, and alpha (the rank is 4): what scale * B is must arrive.
FOLDED = [
    (60000.0, torch.float16, 16.0),  # overflows float16
    (3e-5, torch.float16, 0.0000019073486328125),  # vanishes in float16, by a power of two
    (3e-5, torch.float16, 4.0 / 1024),  # loses digits in float16
    (3e38, torch.bfloat16, 2.0),
    (0.1, torch.float16, 5.0),
    (-0.0, torch.float16, 16.0),
    (1e-40, torch.bfloat16, 2.0),
    (1.5, torch.bfloat16, 8.0),
    (1e30, torch.float64, 8.0),
    (0.1, torch.float64, 1.0),
]


@pytest.mark.parametrize(("value", "dtype", "alpha"), FOLDED)
def test_a_folded_scale_keeps_the_numbers(
    value: float, dtype: torch.dtype, alpha: float, tmp_path: Path
) -> None:
    a, b = filled(value, dtype)
    folder = adapter(tmp_path / "it", a, b, alpha)
    assert run_hub("add", folder, "--name", "mine").code == 0
    ran = run_hub("export", "mine", "--portable", tmp_path / "out")
    assert ran.code == 0, ran.err
    found = load_file(tmp_path / "out" / ADAPTER)
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    scale = settings["lora_alpha"] / settings["r"]
    expected = b.double() * (alpha / 4)
    torch.testing.assert_close(found[B].double() * scale, expected, rtol=2**-22, atol=2**-149)
    assert len({t.dtype for t in found.values()}) == 1


# Each cannot be folded even in float32.
UNFOLDABLE = [
    (3e38, torch.float32, 999_999.0),
    (3e-44, torch.float32, 1e-3),
]


@pytest.mark.parametrize(("value", "dtype", "alpha"), UNFOLDABLE)
@pytest.mark.parametrize("way", ["portable", "peft"])
def test_a_scale_that_cannot_be_folded(
    way: str,
    value: float,
    dtype: torch.dtype,
    alpha: float,
    tmp_path: Path,
    base_folder: Path,
) -> None:
    a, b = filled(value, dtype)
    folder = adapter(tmp_path / "it", a * (1e-30 if value > 1 else 1), b, alpha)
    assert run_hub("add", folder, "--name", "mine").code == 0
    out = tmp_path / "out"
    if way == "portable":
        ran = run_hub("export", "mine", "--portable", out)
    else:
        recipe = f"base: {base_folder}\nexperts: [mine]\nmerge: {{method: linear}}\n"
        Path("recipe.yaml").write_text(recipe + "dtype: float32\n")
        ran = run_hub("compose", "recipe.yaml", "--out", out, "--format", "peft")
    assert ran.code in (1, 3), ran.err
    assert MODULE in ran.err and "Traceback" not in ran.err
    assert not out.exists()


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "gate", "task vector", "coefficients"])
@pytest.mark.parametrize("value", [3.5e38, -1e300, 3.4028235677973366e38, math.inf])
def test_float64_that_float32_cannot_hold(where: str, value: float, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    large = torch.tensor([[value]], dtype=torch.float64)
    if where == "task vector":
        folder.mkdir()
        save_file({"x.weight": large}, folder / "task_vector.safetensors")
    elif where == "coefficients":
        folder.mkdir()
        save_file({"coefficients": large}, folder / "coefficients.safetensors")
        experts = [{"expert": "a", "digest": "sha256:" + "0" * 64}]
        record = {"method": "m", "granularity": "model", "blocks": ["b"], "experts": experts}
        (folder / "coefficients.json").write_text(json.dumps(record))
    else:
        a, b = filled(1.0, torch.float64)
        if where != "gate":
            (a if where == "lora_A" else b)[0, 0] = value
        adapter(folder, a, b, 4.0)
        if where == "gate":
            gates = {f"{MODULE}.gate": large.expand(1, 32).reshape(-1).contiguous()}
            save_file(gates, folder / "phatgoose_gates.safetensors")
    ran = run_hub("add", folder, "--name", "mine")
    assert ran.code == 3 and "tensor" in ran.err, ran.err
    assert not Store().list_objects()


def test_the_largest_float32_is_held(tmp_path: Path) -> None:
    a, b = filled(float(torch.finfo(torch.float32).max), torch.float64)
    assert run_hub("add", adapter(tmp_path / "it", a, b, 4.0), "--name", "mine").code == 0


def overflowing(base_folder: Path, tmp_path: Path, method: str, dtype: str, size: float) -> None:
    """Write recipe.yaml of two experts whose activations overflow."""
    folders = [
        make_expert(tmp_path / f"e{i}", base_folder, i, size=size, gates=True) for i in (1, 2)
    ]
    kind = "merge" if method == "linear" else "route"
    Path("recipe.yaml").write_text(
        f"base: {base_folder}\nexperts: [{folders[0]}, {folders[1]}]\n"
        f"{kind}: {{method: {method}}}\ndtype: {dtype}\n"
    )


ROUTES = [
    ("uniform", "float32", 1e18),
    ("phatgoose", "float32", 1e18),
    ("arrow", "float32", 1e12),
    ("phatgoose", "float16", 200.0),
    ("smear", "float32", 1e18),
]


@pytest.mark.parametrize(("method", "dtype", "size"), ROUTES)
@pytest.mark.parametrize("command", ["generate", "sample", "trace", "trace generate", "html"])
def test_a_route_that_overflows(
    command: str, method: str, dtype: str, size: float, tmp_path: Path, base_folder: Path
) -> None:
    if method != "phatgoose" and command in ("sample", "html"):
        pytest.skip("one method is enough for these")
    overflowing(base_folder, tmp_path, method, dtype, size)
    page = tmp_path / "page.html"
    words = {
        "generate": ("generate", "recipe.yaml", "--max-new-tokens", "3", "--json"),
        "sample": ("generate", "recipe.yaml", "--max-new-tokens", "3", "--temperature", "1"),
        "trace": ("trace", "recipe.yaml", "--json"),
        "trace generate": ("trace", "recipe.yaml", "--generate", "2", "--json"),
        "html": ("trace", "recipe.yaml", "--html", str(page)),
    }[command]
    refused_with_place(run_hub(*words, "--prompt", "hello"))
    assert not page.exists()


@pytest.mark.parametrize("command", ["generate", "sample"])
def test_a_merge_whose_activations_overflow(
    command: str, tmp_path: Path, base_folder: Path
) -> None:
    overflowing(base_folder, tmp_path, "linear", "float32", 1e13)
    more = () if command == "generate" else ("--temperature", "1")
    refused_with_place(run_hub("generate", "recipe.yaml", "--prompt", "hello", *more))


def refused_with_place(ran: Ran) -> None:
    assert (ran.code, ran.out) == (3, ""), ran
    assert "NaN or infinity" in ran.err and "model.layers.0" in ran.err
    assert "Traceback" not in ran.err


# What an expert.json may have in place of a score or of a result of the training.
WORDS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]


def describe(folder: Path, **fields: str) -> None:
    """Write an expert.json with raw JSON texts as fields."""
    identity = '{"schema": 1, "kind": "lora", "base_fingerprint": null, "files": {%s}}'
    files = ", ".join(
        f'"{p.name}": {{"sha256": "{hashlib.sha256(p.read_bytes()).hexdigest()}", '
        f'"size": {p.stat().st_size}}}'
        for p in sorted(folder.iterdir())
    )
    texts = {"identity": identity % files, "name": '"mine"', "base": '"tiny"', **fields}
    body = ", ".join(f'"{key}": {text}' for key, text in texts.items())
    (folder / "expert.json").write_text("{" + body + "}")


def score(word: str) -> str:
    return (
        f'[{{"task": "t", "split": "test", "metric": "accuracy", "n": 1, "base": {word}, '
        f'"expert": 0.5}}]'
    )


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("field", ["scores", "training"])
@pytest.mark.parametrize("way", ["add", "pull"])
def test_a_description_with_no_number(
    way: str, field: str, word: str, expert_folder: Make, home: Path
) -> None:
    folder = expert_folder(1, gates=False)
    text = score(word) if field == "scores" else f'{{"loss": [1.0, {word}]}}'
    describe(folder, **{field: text})
    words = ("add", folder, "--name", "mine") if way == "add" else ("pull", f"file:{folder}")
    ran = run_hub(*words)
    assert ran.code == 3, ran.err
    assert field in ran.err and "Traceback" not in ran.err
    listed = run_hub("list", "--json")
    assert listed.code == 0 and "mine" not in listed.out
    parse_strictly(listed.out)


@pytest.mark.parametrize("word", [".nan", ".inf", "-.inf", "1e999"])
@pytest.mark.parametrize("field", ["scores", "training", "delta_ci95"])
def test_a_registry_with_no_number(field: str, word: str, home: Path) -> None:
    """An entry that an earlier version wrote must not make every list fail."""
    entry = {
        "scores": score(word),
        "training": f"{{loss: {word}}}",
        "delta_ci95": score(f"0.5, delta_ci95: [{word}, 1.0]"),
    }[field]
    key = "training" if field == "training" else "scores"
    place = home / "registry" / "mine" / "1.yaml"
    place.parent.mkdir(parents=True)
    digest = "sha256:" + "0" * 64
    place.write_text(
        "version: 1\nexperts:\n"
        f"- {{name: mine, base: b, sources: ['file:/x'], digest: '{digest}', {key}: {entry}}}\n"
    )
    for words in (("list", "--json"), ("show", "mine", "--json"), ("search", "mine", "--json")):
        ran = run_hub(*words)
        assert ran.code == 0, ran.err
        assert "mine" in json.dumps(parse_strictly(ran.out))
    assert run_hub("list").code == run_hub("show", "mine").code == 0


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_json_has_no_such_numbers(value: float) -> None:
    for encode in (encode_json, canonical_json):
        with pytest.raises(IntegrityError, match=r"tasks\[1\]\.score is (nan|-?inf)"):
            encode({"tasks": [{"score": 1.0}, {"score": value}]})
    assert encode_json({"x": -0.0, "y": 5e-324, "z": 1.7976931348623157e308})


# Sizes and settings that overflow where they are used.
SETTINGS = [
    {"r": 10**30},
    {"lora_alpha": 10**400},
    {"lora_alpha": 1e308},
    {"lora_alpha": 5e-324},
    {"lora_alpha": -0.0},
    {"rank_pattern": {"q_proj": 2**63}},
    {"alpha_pattern": {"q_proj": 10**400}},
    {"layers_to_transform": [2**64]},
    {"layers_to_transform": 10**400},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_that_overflow(
    settings: dict[str, Any], tmp_path: Path, base_folder: Path
) -> None:
    folder = adapter(tmp_path / "it", *filled(1.0), 4.0)
    config = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(config))
    ran = run_hub("add", folder, "--name", "mine")
    assert "Traceback" not in ran.err
    assert ran.code in (0, 3), ran.err
    if ran.code == 0:
        recipe = f"base: {base_folder}\nexperts: [mine]\nmerge: {{method: linear}}\n"
        Path("recipe.yaml").write_text(recipe + "dtype: float32\n")
        ran = run_hub("compose", "recipe.yaml", "--out", tmp_path / "out")
        assert ran.code in (0, 3) and "Traceback" not in ran.err


# Fields of skills.json and of a description that overflow.
RECORDS = [{"alpha": 10**400}, {"alpha": 1e308}, {"rank": 10**400}, {"n_heads": 2**64}]


@pytest.mark.parametrize("fields", RECORDS, ids=str)
def test_skills_that_overflow(fields: dict[str, Any], tmp_path: Path, base_folder: Path) -> None:
    folder = tmp_path / "it"
    MAKERS["skills"](folder, base_folder)
    record = json.loads((folder / "skills.json").read_text()) | fields
    (folder / "skills.json").write_text(json.dumps(record))
    ran = run_hub("add", folder, "--name", "mine")
    assert ran.code == 3 and "Traceback" not in ran.err, ran.err


def test_a_json_file_may_keep_infinity_where_models_have_it(tmp_path: Path) -> None:
    """The configurations of some models hold Infinity, which is not printed by the hub."""
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json")["time_step_limit"][1] == math.inf


@pytest.mark.parametrize("form", [(), ("--sparse", "0.5")])
def test_a_difference_that_vanishes_in_its_dtype(
    form: tuple[str, ...], tmp_path: Path, base_folder: Path
) -> None:
    tuned = shutil.copytree(base_folder, tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    name = f"{MODULE}.weight"
    weights = {n: t.double() for n, t in weights.items()}
    torch.manual_seed(0)
    weights[name] = weights[name] + 1e-12 * torch.randn(32, 32, dtype=torch.float64)
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    ran = run_hub("diff", base_folder, tuned, "--name", "mine", "--dtype", "float16", *form)
    assert ran.code == 1 and name in ran.err and "float16" in ran.err, ran.err
