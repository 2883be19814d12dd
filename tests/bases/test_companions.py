"""The files beside the weights of a base travel with a merged model, and with `hf:` bases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_expert, run_hub, tiny_bert, tiny_llama
from experthub.hub.bases import base_sources
from experthub.hub.files import yaml_files
from experthub.hub.session import Session
from experthub.hub.transfer.remotes import hf
from experthub.hub.transfer.remotes._hf_files import EARLIER_MODEL
from hf_server import HfServer
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import save_file

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
PIXELS: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.4, 0.4, 0.4],
    "image_std": [0.3, 0.3, 0.3],
}
NEVER = ("handler.py", "pytorch_model.bin", "model.gguf", "optimizer.pt", "LICENSE.py", "README.md")


def merge(base: Path, targets: tuple[str, ...], out: Path) -> Any:
    make_expert(out.with_name(f"{out.name}-expert"), base, 1, targets=targets, gates=False)
    content = {
        "base": str(base),
        "experts": [str(out.with_name(f"{out.name}-expert"))],
        "merge": {"method": "linear"},
    }
    Path("recipe.yaml").write_text(yaml_files.dump(content))
    return run_hub("compose", "recipe.yaml", "--out", out)


def tiny_clip(folder: Path) -> Path:
    tiny_bert(folder)
    torch.manual_seed(0)
    text = {k: VISION[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"vocab_size": 132, "num_attention_heads": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    return folder


def test_a_merged_clip_keeps_its_processors(tmp_path: Path) -> None:
    base, out = tiny_clip(tmp_path / "clip"), tmp_path / "out"
    ran = merge(base, ("q_proj",), out)
    assert ran.code == 0, ran.err
    for load in (transformers.AutoImageProcessor, transformers.AutoTokenizer):
        before, after = load.from_pretrained(base), load.from_pretrained(out)
        assert type(before) is type(after)
    assert list(transformers.AutoImageProcessor.from_pretrained(out).image_mean) == [0.4] * 3
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "CLIPProcessor"


def test_every_file_beside_the_weights_travels_and_nothing_else(tmp_path: Path) -> None:
    base, out = tiny_llama(tmp_path / "base"), tmp_path / "out"
    travels = {
        "chat_template.jinja": "{{ messages[0]['content'] }}",
        "additional_chat_templates/tools.jinja": "{{ 1 }}",
        "special_tokens_map.json": '{"bos_token": "<s>"}',
        "tokenizer.model": "vocabulary",
        "spiece.model": "vocabulary",
        "video_preprocessor_config.json": "{}",
        "LICENSE.txt": "a licence",
        "GEMMA_TERMS.html": "terms",
        "NOTICE": "a notice",
    }
    for name, text in travels.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    for name in NEVER:
        (base / name).write_text("import os")
    ran = merge(base, ("q_proj",), out)
    assert ran.code == 0, ran.err
    for name, text in travels.items():
        assert (out / name).read_text() == text
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not [name for name in NEVER if (out / name).exists()]


def sentence_encoder(folder: Path, weights: str | None = "model.safetensors") -> Path:
    """An encoder that pools with its first token, and then has a dense part."""
    tiny_bert(folder)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    record = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(record))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    pooling |= {"pooling_mode_mean_tokens": False}
    dense = {"in_features": 32, "out_features": 8, "bias": False}
    dense |= {"activation_function": "torch.nn.modules.activation.Tanh"}
    for name, config in (("1_Pooling", pooling), ("2_Dense", dense)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    if weights == "model.safetensors":
        weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
        save_file({"linear.weight": weight}, folder / "2_Dense" / weights)
    elif weights:
        (folder / "2_Dense" / weights).write_bytes(b"\x80\x02a pickle")
    return folder


def list_names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_merged_sentence_encoder_keeps_its_parts(tmp_path: Path) -> None:
    base, out = sentence_encoder(tmp_path / "encoder"), tmp_path / "out"
    (base / "1_Pooling" / "code.py").write_text("import os")
    ran = merge(base, ("query",), out)
    assert ran.code == 0, ran.err
    assert list_names(base) - list_names(out) == {"1_Pooling/code.py"}
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (base / name).read_bytes() == (out / name).read_bytes()


def test_a_part_with_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    base, out = sentence_encoder(tmp_path / "encoder", "pytorch_model.bin"), tmp_path / "out"
    ran = merge(base, ("query",), out)
    assert ran.code == 1 and "2_Dense has its weights in a pickle" in ran.err
    assert not out.exists()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def publish(server: HfServer, folder: Path, repository: str) -> None:
    api = HfApi(endpoint=server.url, token="hf_write")
    api.create_repo(repository)
    files = [CommitOperationAdd(name, str(folder / name)) for name in sorted(list_names(folder))]
    api.create_commit(repository, files, commit_message="a base")


def test_the_parts_of_a_repository_are_fetched(server: HfServer, tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "encoder")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    for name in ("LICENSE", "spiece.model", "handler.py", "1_Pooling/code.py", "1_Pooling/a.bin"):
        (folder / name).write_text("a")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    publish(server, folder, "alice/encoder")
    found = base_sources.find("hf:alice/encoder", Session())
    missing = list_names(folder) - list_names(found.folder)
    # With a tokenizer.json, transformers reads no other form of the vocabulary.
    others = {"1_Pooling/code.py", "1_Pooling/a.bin", "onnx/config.json"}
    assert missing == {"handler.py", "spiece.model", *others}
    assert run_hub("verify").code == 0
    (found.folder / "1_Pooling/config.json").write_text("{}")
    ran = run_hub("verify")
    assert ran.code == 3 and "1_Pooling/config.json" in ran.out + ran.err
    assert run_hub("verify", "--repair").code == 0
    assert (found.folder / "1_Pooling/config.json").read_bytes() == (
        folder / "1_Pooling/config.json"
    ).read_bytes()


def test_a_vocabulary_alone_is_fetched(server: HfServer, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "encoder")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_text("vocabulary")
    publish(server, folder, "alice/encoder")
    found = base_sources.find("hf:alice/encoder", Session())
    assert (found.folder / "spiece.model").read_text() == "vocabulary"


def test_a_folder_of_an_earlier_version_stays_in_use(
    server: HfServer, tmp_path: Path, home: Path
) -> None:
    folder = sentence_encoder(tmp_path / "encoder")
    publish(server, folder, "alice/encoder")
    old, _ = hf.fetch("hf:alice/encoder", home / "hf", EARLIER_MODEL)
    asked = len(server.seen("/resolve/"))
    assert base_sources.find("hf:alice/encoder", Session()).folder == old
    assert len(server.seen("/resolve/")) == asked
    (old / "config.json").write_text("{}")
    assert run_hub("verify", "--repair").code == 0
    assert json.loads((old / "config.json").read_text())["hidden_size"] == 32
