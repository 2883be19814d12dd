"""Odd values in a base's config.json: one error that names the key, before any model runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES
from conftest import run_hub, tiny_bert
from experthub.hub.bases.base import read
from experthub.hub.bases.building import find_class
from experthub.hub.bases.loading import load_model
from experthub.hub.errors import IntegrityError
from experthub.hub.materials.sentence_encoder import SentenceEncoder

ODD: list[tuple[str, Any]] = [
    ("sliding_window", "x"),
    ("sliding_window", []),
    ("sliding_window", -1),
    ("sliding_window", 3.5),
    ("attention_chunk_size", "x"),
    ("layer_types", "x"),
    ("layer_types", [1, 2]),
    ("num_kv_shared_layers", "x"),
    ("is_causal", "x"),
    ("attention_dropout", []),
    ("rope_theta", "x"),
    ("rope_theta", []),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    ("rope_scaling", "x"),
    ("rope_scaling", {"rope_type": "linear", "factor": "x"}),
    ("hidden_act", 3),
    ("rms_norm_eps", "x"),
    ("hidden_size", "x"),
    ("pad_token_id", 1.5),
    ("eos_token_id", "x"),
    ("output_hidden_states", "x"),
    ("chunk_size_feed_forward", "x"),
    ("is_encoder_decoder", "x"),
    ("id2label", "x"),
    ("tie_word_embeddings", "x"),
]


@pytest.fixture
def write(base_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a base with other settings; None removes one."""

    def make(**settings: Any) -> Path:
        folder = Path(shutil.copytree(base_folder, tmp_path / "odd"))
        content = json.loads((folder / "config.json").read_text()) | settings
        if "rope_theta" in settings or "rope_scaling" in settings:
            del content["rope_parameters"]  # The older keys have no effect beside it.
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return make


def find_key(key: str, value: Any) -> str:
    """The key that an error names: transformers moves those of rotary embeddings."""
    if isinstance(value, dict):
        return next(name for name, inner in value.items() if inner == "x")
    return "rope_parameters" if key == "rope_scaling" else key


@pytest.mark.parametrize(("key", "value"), ODD)
def test_an_odd_value_is_an_error_that_names_its_key(
    key: str, value: Any, write: Callable[..., Path]
) -> None:
    folder = write(**{key: value})
    with pytest.raises(IntegrityError) as found:
        find_class(read(folder, str(folder)))
    assert find_key(key, value) in found.value.message
    assert str(folder / "config.json") in found.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", "x"),
        ("rope_theta", "x"),
        ("attention_dropout", []),
        ("hidden_act", "nope"),
        ("cache_implementation", "x"),
        ("cache_implementation", ["static"]),
    ],
)
@pytest.mark.parametrize("command", ["eval", "trace", "compose", "generate"])
def test_every_command_reports_it(
    command: str,
    key: str,
    value: Any,
    write: Callable[..., Path],
    expert_folder: Callable[..., Path],
    tiny_task: str,
) -> None:
    content = {"base": str(write(**{key: value})), "experts": [str(expert_folder(0))]}
    Path("recipe.yaml").write_text(json.dumps(content | {"route": {"method": "uniform"}}))
    more = {
        "eval": ["--tasks", tiny_task],
        "trace": ["--prompt", "x", "--html", "trace.html"],
        "compose": ["--out", "out"],
        "generate": ["--prompt", "x"],
    }[command]
    ran = run_hub(command, "recipe.yaml", *more)
    assert ran.code == 3, ran
    (error,) = ran.lines("error:")
    assert key in error
    assert "Traceback" not in ran.err
    assert not Path("out").exists()
    assert not Path("trace.html").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "layer_types": ["full_attention", "full_attention"]},
        {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"attention_dropout": 0, "problem_type": None, "id2label": {"0": "a"}},
        {"torch_dtype": "bfloat16", "eos_token_id": [1, 2]},
    ],
)
def test_settings_of_published_bases_are_taken(
    settings: dict[str, Any], write: Callable[..., Path]
) -> None:
    folder = write(**settings)
    find_class(read(folder, str(folder)))


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_an_unknown_cache_of_generation_is_reported(
    command: str, write: Callable[..., Path], tiny_task: str, expert_folder: Callable[..., Path]
) -> None:
    folder = write()
    (folder / "generation_config.json").write_text('{"cache_implementation": "x"}')
    content = {"base": str(folder), "experts": [str(expert_folder(0))]}
    Path("recipe.yaml").write_text(json.dumps(content | {"route": {"method": "uniform"}}))
    more = {"eval": ["--tasks", tiny_task], "generate": ["--prompt", "x"]}[command]
    ran = run_hub(command, "recipe.yaml", *more)
    assert ran.code == 3, ran
    (error,) = ran.lines("error:")
    assert "generation_config.json: cache_implementation is 'x'" in error


@pytest.mark.parametrize("name", [None, "static", "dynamic", "hybrid", "offloaded"])
def test_the_caches_of_published_bases_are_taken(name: str, write: Callable[..., Path]) -> None:
    folder = write(cache_implementation=name)
    (folder / "generation_config.json").write_text(json.dumps({"cache_implementation": name}))
    find_class(read(folder, str(folder)))


@pytest.mark.parametrize("command", ["eval", "trace", "generate"])
def test_a_base_that_returns_tuples_is_read(
    command: str, write: Callable[..., Path], tiny_task: str, expert_folder: Callable[..., Path]
) -> None:
    found = []
    for stated in (True, False):
        folder = write(return_dict=stated)
        content = {"base": str(folder), "experts": [str(expert_folder(0))]}
        Path("recipe.yaml").write_text(json.dumps(content | {"route": {"method": "uniform"}}))
        more = {
            "eval": ["--tasks", tiny_task, "--json"],
            "trace": ["--prompt", "x", "--json"],
            "generate": ["--prompt", "x"],
        }[command]
        ran = run_hub(command, "recipe.yaml", *more)
        assert ran.code == 0, ran.err
        found.append(ran.out)
        shutil.rmtree(folder)
    if command == "generate":
        assert found[0] == found[1]


def test_a_part_that_returns_tuples_is_read(tmp_path: Path) -> None:
    folder = ARCHITECTURES["llava"].save(tmp_path / "llava")
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"return_dict": False}
    for part in ("text_config", "vision_config"):
        content[part]["return_dict"] = False
    path.write_text(json.dumps(content))
    model = load_model(read(folder, "llava"), "float32", None)
    configs = [model.config, model.config.text_config, model.config.vision_config]
    assert all(config.return_dict for config in configs)


def test_an_encoder_that_returns_tuples_is_read(tmp_path: Path) -> None:
    texts, found = ["a text", "another"], []
    for stated in (True, False):
        folder = tiny_bert(tmp_path / str(stated))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": stated}))
        found.append(SentenceEncoder.load(read(folder, "encoder"))(texts))
    assert found[0].equal(found[1])
