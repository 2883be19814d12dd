"""Every kind of base: read, scored, fine-tuned, merged by what is learned on it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert, tiny_llama
from experthub import hub
from experthub.hub.bases.base import read
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.errors import HubError, UsageError
from experthub.hub.readers.preparation import Preparation
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.readers.scorer import Question
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task
from experthub.hub.training.fit import Settings
from experthub.merge import AttachedExperts, Dense, Fit, TaskVector
from experthub.merge._fitting import make_start_coefficients
from safetensors.torch import save_file

LABELS = ["red", "green", "blue"]


def tokenizer_of(folder: Path) -> None:
    """One of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(128))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def seq2seq(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=131,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=0.5,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer_of(folder)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def classifier(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    named = {"id2label": dict(enumerate([*LABELS, "other"]))}
    named["label2id"] = {label: i for i, label in named["id2label"].items()}
    config = ViTConfig(**VISION, **named, initializer_range=0.2)
    model = ViTForImageClassification(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # Under the names of its modules, where transformers would write those of an older version.
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


SMALL_TEXT = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    factor = {"initializer_factor": 4.0}
    config = CLIPConfig(
        text_config=SMALL_TEXT | factor, vision_config=VISION | factor, projection_dim=16, **factor
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer_of(folder)


def siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    model = SiglipModel(SiglipConfig(text_config=SMALL_TEXT, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    tokenizer_of(folder)


def text_classifier(folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tiny_bert(folder)
    config = BertConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: i for i, label in enumerate(LABELS)}
    BertForSequenceClassification(config).save_pretrained(folder)


MADE: dict[str, Callable[[Path], object]] = {
    "seq2seq": seq2seq,
    "image": classifier,
    "clip": clip,
    "siglip": siglip,
    "text": text_classifier,
}
OTHERS = {"causal": tiny_llama, "encoder": tiny_bert}


@pytest.fixture(params=list(MADE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (MADE | OTHERS)[kind](tmp_path / "base")
    return tmp_path / "base"


def png(colour: int, number: int) -> str:
    """A square with some noise in one of three colours, in base64."""
    from PIL import Image

    random = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 90, (20, 20, 3), generator=random, dtype=torch.uint8)
    pixels[:, :, colour] += 150
    file = io.BytesIO()
    Image.frombytes("RGB", (20, 20), pixels.numpy().tobytes()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def task(kind: str) -> str:
    words = ["fire", "grass", "sea"]
    examples = []
    for n in range(90):
        text = png(n % 3, n) if kind in ("image", "clip", "siglip") else f"{words[n % 3]} {n}"
        examples.append(Example(id=example_id(text, LABELS), input=text, targets=[LABELS[n % 3]]))
    card = Card(name="colours", source="made-up", kind="labels", labels=LABELS)
    return write_task("local", card, examples)


@pytest.mark.sampled(3)
def test_an_expert_is_trained_merged_and_scored(folder: Path, task: str, kind: str) -> None:
    settings = Settings(steps=40, batch_size=16, lr=3e-3, examples=60)
    full = hub.train_full(str(folder), task, "full", settings).expert
    low = hub.train_lora(str(folder), task, "low", Settings(steps=10, batch_size=16, lr=1e-2))
    heads = ("classifier", "score", "text_model", "text_projection", "logit_scale")
    recipe = {
        "base": str(folder),
        "experts": [full.reference, low.reference],
        "merge": {"method": "adamerging", "steps": 3, "lr": 0.1},
        "data": {"tasks": [task], "limit": 8},
    }
    composition = hub.compose(recipe)
    assert not [name for name in composition.plan.parameters if name.startswith(heads)]
    assert len(composition.state.history) == 3
    alone = {"base": str(folder), "experts": [full.reference], "merge": {"method": "linear"}}
    recipes = {"alone": hub.Recipe.of(alone), "learned": hub.Recipe.of(recipe)}
    found = hub.evaluate(recipes, [task], split="train")
    assert found["average"]["alone"]["delta_to_base"]["ci95"][0] > 0
    assert found["protocol"]["score"] == reader_for(composition.plan.base, None).name


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_skills_of_models_that_are_read_in_parts_need_a_task(
    folder: Path, task: str, kind: str
) -> None:
    """The reader calls the vision model alone, which does not know the tasks of the rows."""
    found = read_task(task)
    other = write_task("local", found.card.model_copy(update={"name": "again"}), found.examples)
    shape, settings = hub.InventoryShape(skills=2, rank=2), Settings(steps=2)
    hub.train_skills(str(folder), [task, other], "many", shape, settings)
    recipe = {"base": str(folder), "experts": ["many"], "route": {"method": "mhr"}}
    with pytest.raises(UsageError, match="cannot choose the skills of many") as caught:
        hub.compose(recipe)
    assert task in caught.value.hint
    hub.compose(recipe | {"route": {"method": "mhr", "task": task}})


@pytest.mark.parametrize("kind", ["seq2seq"])
def test_encoder_decoder_models_get_no_skills(folder: Path, task: str, kind: str) -> None:
    with pytest.raises(HubError, match="is an encoder-decoder model"):
        hub.train_skills(str(folder), [task], "s", hub.InventoryShape(), Settings(steps=1))


@pytest.mark.parametrize("kind", [*MADE, *OTHERS])
def test_what_learns_reads_what_is_composed(folder: Path, kind: str) -> None:
    """The expert changes every weight, tied ones included."""
    base = read(folder, "base")
    random = torch.Generator().manual_seed(5)
    changes = {n: 0.3 * torch.randn(s, generator=random) for n, s in base.shapes.items()}
    vector = TaskVector(base.fingerprint, {n: partial(Dense, d) for n, d in changes.items()})
    images = kind in ("image", "clip", "siglip")
    texts = [png(0, 1), png(2, 2)] if images else ["fire 1", "the sea"]
    questions = [Question(text, tuple(LABELS)) for text in texts]

    def logits(model: Any) -> torch.Tensor:
        reader = reader_for(base, None)
        return reader.read(model, [reader.row(q) for q in questions])

    model = load_model(base, "float32", None)
    start = make_start_coefficients(
        [vector], Fit("entropy", "task", start=0.5, steps=1, lr=1.0, batch_size=1)
    )
    with torch.no_grad(), AttachedExperts(model, [vector], start) as attached:
        attached.set(start.values)
        learned_on = logits(model)
    expert = folder.parent / "expert"
    expert.mkdir()
    save_file(changes, expert / "task_vector.safetensors")
    merge = {"method": "task_arithmetic", "scale": 0.5}
    recipe = {"base": str(folder), "experts": [str(expert)], "merge": merge}
    composition = hub.compose(recipe)
    saved = read(composition.save(folder.parent / "merged"), "merged")
    with torch.no_grad():
        torch.testing.assert_close(learned_on, logits(composition.model))
        torch.testing.assert_close(learned_on, logits(load_model(saved, "float32", None)))


def test_logits_do_not_depend_on_the_batch(folder: Path, kind: str) -> None:
    base = read(folder, "base")
    model, reader = load_model(base, "float32", None), reader_for(base, None)
    texts = ["a", "a longer one"] if kind in ("seq2seq", "text") else [png(0, 1), png(2, 2)]
    choices = [tuple(LABELS[:2]), tuple(LABELS)]
    rows = [reader.row(Question(t, c)) for t, c in zip(texts, choices, strict=True)]
    with torch.no_grad():
        both = reader.read(model, rows)
        for row, alone in zip(both, rows, strict=True):
            own = reader.read(model, [alone])[0]
            torch.testing.assert_close(row[: len(own)], own, rtol=1e-4, atol=1e-5)
    assert both[0, 2] == float("-inf")


def test_seq2seq_is_the_likelihood_of_the_answer(tmp_path: Path) -> None:
    """The reference is the loss that transformers computes."""
    torch.manual_seed(0)
    seq2seq(tmp_path / "base")
    base = read(tmp_path / "base", "base")
    model, tokenizer = load_model(base, "float32", None), load_tokenizer(base)
    reader = reader_for(base, None)
    row = reader.row(Question("which?", ("red", "a b")))
    with torch.no_grad():
        found = reader.read(model, [row])[0].tolist()
        for value, choice in zip(found, ("red", "a b"), strict=True):
            asked = tokenizer("which?", return_tensors="pt")["input_ids"]
            answer = tokenizer(choice, return_tensors="pt")["input_ids"]
            assert value == pytest.approx(
                -float(model(input_ids=asked, labels=answer).loss), abs=1e-5
            )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_cosines_are_transformers_own(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MADE[kind](tmp_path / "base")
    base = read(tmp_path / "base", "base")
    model, tokenizer = load_model(base, "float32", None), load_tokenizer(base)
    reader = reader_for(base, None)
    image = png(1, 3)
    pixels = Preparation.of(base, 16).pixels(image)[None]
    template, padding = {
        "clip": ("a photo of a {}.", {"padding": True}),
        "siglip": ("This is a photo of {}.", {"padding": "max_length", "max_length": 64}),
    }[kind]
    batch = tokenizer([template.format(one) for one in LABELS], return_tensors="pt", **padding)
    if kind == "siglip":  # Its tokenizer makes no mask.
        del batch["attention_mask"]
    with torch.no_grad():
        found = reader.read(model, [reader.row(Question(image, tuple(LABELS)))])[0]
        wanted = model(
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            pixel_values=pixels,
        ).logits_per_image[0]
    bias = getattr(model, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(found + bias, wanted, rtol=1e-4, atol=1e-4)


class TestImages:
    def test_a_label_that_the_base_does_not_have(self, tmp_path: Path) -> None:
        classifier(tmp_path / "base")
        reader = reader_for(read(tmp_path / "base", "base"), None)
        with pytest.raises(
            UsageError, match="the base has no label 'pink'; it has blue, green, other"
        ):
            reader.row(Question(png(0, 1), ("red", "pink")))

    def test_a_variation_is_moved_and_the_same_again(self, tmp_path: Path) -> None:
        classifier(tmp_path / "base")
        reader: Any = reader_for(read(tmp_path / "base", "base"), None)
        row = reader.row(Question(png(0, 1), ("red",)))
        assert torch.equal(row.vary(3).pixels, row.vary(3).pixels)
        assert not torch.equal(row.vary(3).pixels, row.vary(4).pixels)
