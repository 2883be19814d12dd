"""Embeddings are pooled as the files of sentence-transformers state it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from experthub.hub.bases.base import read
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.bases.wheel import unpack_model
from experthub.hub.errors import IntegrityError, UsageError
from experthub.hub.materials.sentence_encoder import SentenceEncoder
from experthub.hub.readers.features import Features
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.readers.scorer import Question
from experthub.hub.readers.similarity import SCALE
from experthub.hub.training.objectives import SimilarityLoss, make_objective
from torch import Tensor

TEXTS = ["Hello World", "a", "a longer text, with several words"]
LIBRARY = "sentence_transformers.models."
# The name and the setting of each way to pool, and its formula for the hidden states of one text.
MODES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "cls": ({"pooling_mode_cls_token": True}, lambda h: h[0]),
    "mean": ({"pooling_mode": "mean"}, lambda h: h.mean(0)),
    "max": ({"pooling_mode_max_tokens": True}, lambda h: h.amax(0)),
    "last": ({"pooling_mode_lasttoken": True}, lambda h: h[-1]),
    "sqrt": ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda h: h.sum(0) / len(h) ** 0.5),
    "weighted": (
        {"pooling_mode": "weightedmean"},
        lambda h: torch.arange(1, len(h) + 1).to(h) @ h / (len(h) * (len(h) + 1) / 2),
    ),
    "none": ({}, lambda h: h.mean(0)),
    "several": (
        {
            "pooling_mode_lasttoken": True,
            "pooling_mode_mean_sqrt_len_tokens": True,
            "pooling_mode_cls_token": True,
        },
        lambda h: torch.cat([h[0], h.sum(0) / len(h) ** 0.5, h[-1]]),
    ),
    "a list": ({"pooling_mode": ["lasttoken", "cls"]}, lambda h: torch.cat([h[-1], h[0]])),
}


def write_rule(
    folder: Path,
    pooling: dict[str, Any] | None,
    *more: str,
    prompt: str | None = None,
    kinds: tuple[str, ...] = ("Transformer", "Pooling"),
    **stated: Any,
) -> Path:
    """Write the files of sentence-transformers into a folder."""
    types = [*(LIBRARY + kind for kind in kinds), *(LIBRARY + kind for kind in more)]
    paths = ["", *(f"{i}_{t.rpartition('.')[2]}" for i, t in enumerate(types) if i)]
    record = [
        {"idx": i, "path": p, "type": t} for i, (p, t) in enumerate(zip(paths, types, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(record))
    (folder / "sentence_bert_config.json").write_text(json.dumps(stated))
    if prompt is not None:
        own = {"prompts": {"query": prompt}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(own))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        own = {"word_embedding_dimension": 32} | pooling
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert(tmp_path / "encoder")


def compute(folder: Path, texts: list[str], formula: Callable[[Tensor], Tensor]) -> Tensor:
    """Embed each text alone, in float64."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append(formula(hidden))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("mode", MODES)
def test_every_reader_pools_as_the_files_state(mode: str, folder: Path) -> None:
    pooling, formula = MODES[mode]
    write_rule(folder, pooling, "Normalize")
    base, expected = read(folder, "encoder"), compute(folder, TEXTS, formula)
    torch.testing.assert_close(
        SentenceEncoder.load(base)(TEXTS).double(), expected, atol=1e-6, rtol=0
    )
    model = load_model(base, "float32", None)
    features = Features(base)
    torch.testing.assert_close(features.compute(model, TEXTS).double(), expected, atol=1e-6, rtol=0)
    reader, question = reader_for(base, None), Question(TEXTS[0], tuple(TEXTS[1:]))
    cosines = SCALE * expected[1:] @ expected[0]
    with torch.no_grad():
        found = reader.read(model, [reader.row(question)])[0]
    torch.testing.assert_close(found.double(), cosines, atol=1e-4, rtol=0)
    loss = make_objective(base, None)
    assert isinstance(loss, SimilarityLoss)
    rows = [(loss.similarity.tokenise(TEXTS[0]), loss.similarity.heads(TEXTS[1:]), 1)]
    found = loss.compute_loss(model, loss.collate(rows))
    torch.testing.assert_close(found.double(), -cosines.log_softmax(0)[1], atol=1e-4, rtol=0)


def test_a_prompt_and_lower_case_belong_to_the_rule(folder: Path) -> None:
    write_rule(folder, {"pooling_mode": "lasttoken"}, prompt="Query: ", do_lower_case=True)
    base = read(folder, "encoder")
    whole = [f"query: {text.lower()}" for text in TEXTS]
    expected = compute(folder, whole, lambda h: h[-1])
    torch.testing.assert_close(
        SentenceEncoder.load(base)(TEXTS).double(), expected, atol=1e-6, rtol=0
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"more": ("Dense",)}, "with Dense"),
    "unknown mode": ({"pooling": {"pooling_mode": "attention"}}, "pooling_mode 'attention'"),
    "no pooling": ({"kinds": ("Transformer",)}, "no Pooling"),
    "another first module": ({"kinds": ("StaticEmbedding", "Pooling")}, "StaticEmbedding"),
    "without the prompt": (
        {"pooling": {"pooling_mode": "mean", "include_prompt": False}, "prompt": "x"},
        "include_prompt",
    ),
    "missing file": ({"pooling": None}, "no 1_Pooling/config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_rule_that_cannot_be_computed_is_refused_by_name(case: str, folder: Path) -> None:
    settings, message = REFUSED[case]
    given = {"pooling": {}} | settings
    write_rule(folder, given.pop("pooling"), *given.pop("more", ()), **given)
    base = read(folder, "encoder")
    for use in (SentenceEncoder.load, Features, lambda b: reader_for(b, None)):
        with pytest.raises(UsageError, match=message):
            use(base)
    with pytest.raises(UsageError, match=message):
        make_objective(base, None)


def test_a_damaged_list_of_modules_is_refused(folder: Path) -> None:
    (folder / "modules.json").write_text('{"a": 1}')
    with pytest.raises(IntegrityError, match="not a JSON list"):
        read(folder, "encoder")


def test_the_digest_covers_the_rule_where_it_differs_from_the_mean(folder: Path) -> None:
    plain = read(folder, "encoder").digest
    write_rule(folder, {"pooling_mode_mean_tokens": True}, "Normalize", max_seq_length=256)
    assert read(folder, "encoder").digest == plain
    found = {plain}
    for change in (
        {"pooling": {"pooling_mode": "cls"}},
        {"pooling": {"pooling_mode": "max"}},
        {"pooling": {"pooling_mode": ["cls", "max"]}},
        {"pooling": {}, "max_seq_length": 16},
        {"pooling": {}, "do_lower_case": True},
        {"pooling": {}, "prompt": "query: "},
    ):
        write_rule(folder, change.pop("pooling"), **change)  # type: ignore[arg-type]
        found.add(read(folder, "encoder").digest)
    assert len(found) == 7


def test_an_index_of_an_earlier_version_is_one_of_means(folder: Path) -> None:
    encoder = SentenceEncoder.load(read(folder, "encoder"))
    encoder.check(encoder.base.fingerprint)
    other = SentenceEncoder.load(read(write_rule(folder, {"pooling_mode": "cls"}), "encoder"))
    other.check(other.fingerprint)
    for earlier in (encoder.fingerprint, encoder.base.fingerprint):
        with pytest.raises(IntegrityError, match="made by the sentence encoder"):
            other.check(earlier)


def test_a_package_brings_its_pooling(folder: Path, tmp_path: Path) -> None:
    write_rule(folder, {"pooling_mode": "cls"})
    (folder / "1_Pooling" / "code.py").write_text("import os")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, f"tiny/{path.relative_to(folder)}")
    out = tmp_path / "out"
    unpack_model(tmp_path / "a.whl", "tiny/model.safetensors", out)
    assert read(out, "encoder").digest == read(folder, "encoder").digest
    assert not (out / "1_Pooling" / "code.py").exists()
    # An earlier version left the folder out, and took the mean.
    shutil.rmtree(out / "1_Pooling")
    (out / "files.json").write_text("{}")
    base = read(out, "encoder")
    expected = compute(folder, TEXTS, lambda h: h.mean(0))
    torch.testing.assert_close(
        SentenceEncoder.load(base)(TEXTS).double(), expected, atol=1e-6, rtol=0
    )
    assert load_tokenizer(base) is not None
