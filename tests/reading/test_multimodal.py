"""Models of images and text on tasks of texts, against transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architecture_table import make_task
from architectures import ARCHITECTURES, VISION, Architecture
from conftest import make_expert, run_hub
from experthub import hub
from experthub.hub.bases import base as bases
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.readers.likelihood import Likelihood
from experthub.hub.readers.scorer import Question
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task

ROWS = {one.label: one for one in ARCHITECTURES.values()}
QWEN = ROWS["Qwen2.5-VL"]
SEEING = {
    "llava": ROWS["LLaVA"],
    "gemma3": ROWS["Gemma 3 (multimodal)"],
    "qwen2.5-vl": QWEN,
    "qwen2-vl": replace(
        QWEN,
        model="Qwen2VLForConditionalGeneration",
        settings=QWEN.settings
        | {
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "patch_size": 4,
                "initializer_range": 0.2,
            }
        },
    ),
}
TEXT_MODELS = {"llava": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}
QUESTIONS = [
    Question("The sky is", (" blue", " a very long answer", " red")),
    Question("A much longer prompt about the colour of grass is", (" green", " blue")),
    Question("2", (" b", " c")),
]


def compute_alone(model: Any, tokenizer: Any, question: Question) -> list[float]:
    """Sum the log-probabilities of each choice in a text of its own, with transformers alone."""
    found, start = [], len(tokenizer(question.text)["input_ids"])
    for choice in question.choices:
        ids = torch.tensor([tokenizer(question.text + choice)["input_ids"]])
        logs = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
        found.append(float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
    return found


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_choices_are_scored_as_transformers_alone_computes_them(name: str, tmp_path: Path) -> None:
    one = SEEING[name]
    base = bases.read(one.save(tmp_path / "base"), "seeing")
    assert base.is_causal and base.is_multimodal and not base.is_encoder
    model, tokenizer = load_model(base, "float32", None).double(), load_tokenizer(base)
    assert type(model).__name__ == one.model
    found = Likelihood(tokenizer).scores(model, QUESTIONS)
    whole = one.load(tmp_path / "base")
    for scores, question in zip(found, QUESTIONS, strict=True):
        wanted = compute_alone(whole, tokenizer, question)
        assert list(scores.values) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", TEXT_MODELS)
@torch.no_grad()
def test_the_text_model_alone_has_the_same_logits(name: str, tmp_path: Path) -> None:
    one = SEEING[name]
    base = bases.read(one.save(tmp_path / "base"), "seeing")
    model = load_model(base, "float32", None).double()
    kind = getattr(transformers, TEXT_MODELS[name])
    text = kind(model.config.text_config).double().eval()
    text.model.load_state_dict(model.get_decoder().state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    tokenizer = load_tokenizer(base)
    scorer = Likelihood(tokenizer)
    for seeing, reading in zip(
        scorer.scores(model, QUESTIONS), scorer.scores(text, QUESTIONS), strict=True
    ):
        assert seeing.values == pytest.approx(reading.values, rel=1e-12)


@pytest.mark.parametrize("name", SEEING)
def test_eval_and_generate_read_text(name: str, tmp_path: Path, tiny_task: str) -> None:
    one = SEEING[name]
    base = one.save(tmp_path / "base")
    make_expert(tmp_path / "expert", base, 1, targets=("q_proj",), gates=False)
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{tmp_path / 'expert'}]\nmerge: {{method: linear}}")
    ran = run_hub("eval", recipe, "--tasks", tiny_task, "--limit", "4", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["protocol"]["score"] == "mean-token-logprob"
    ran = run_hub("generate", recipe, "--prompt", "The sky", "--max-new-tokens", "5")
    assert ran.code == 0, ran.err
    model = hub.compose(recipe).model
    ids = torch.tensor([load_tokenizer(bases.read(base, "b"))("The sky")["input_ids"]])
    wanted = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    tokenizer = load_tokenizer(bases.read(base, "b"))
    text = tokenizer.decode(wanted, skip_special_tokens=True)
    assert ran.out.rstrip("\n") == text.rstrip("\n")


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Write a configuration as Qwen2-VL was published: the text model's keys are the model's own."""
    text = config.pop("text_config")
    return text | config


@torch.no_grad()
def test_a_published_configuration_without_a_text_part_is_read(tmp_path: Path) -> None:
    one = SEEING["qwen2-vl"]
    folder = one.save(tmp_path / "base")
    nested = load_model(bases.read(folder, "nested"), "float32", None)
    file = folder / "config.json"
    file.write_text(json.dumps(flatten(json.loads(file.read_text()))))
    base = bases.read(folder, "flat")
    assert base.is_multimodal and base.peft_task_type is None
    model, ids = load_model(base, "float32", None), torch.tensor([[5, 9, 40, 7]])
    assert torch.equal(model(input_ids=ids).logits, nested(input_ids=ids).logits)


def test_training_leaves_the_parts_for_images_alone(tmp_path: Path, tiny_task: str) -> None:
    for name, one in SEEING.items():
        base = one.save(tmp_path / name)
        settings = hub.Settings(steps=1, batch_size=2, examples=2)
        made = hub.train_lora(str(base), tiny_task, f"made-{name.replace('.', '-')}", settings)
        folder = Path(made.sources[0].removeprefix("file:"))
        targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert targets
        from safetensors.torch import load_file

        stored = load_file(folder / "adapter_model.safetensors")
        assert all("language_model" in n or "lm_head" in n for n in stored), sorted(stored)[:3]


def make_images() -> str:
    """Write a task of images."""
    return make_task(replace(QWEN, task="image"))


def test_images_are_refused_by_name(tmp_path: Path) -> None:
    base, task = SEEING["llava"].save(tmp_path / "base"), make_images()
    make_expert(tmp_path / "expert", base, 1, targets=("q_proj",), gates=False)
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{tmp_path / 'expert'}]\nmerge: {{method: linear}}")
    ran = run_hub("eval", recipe, "--tasks", task, "--limit", "2")
    assert ran.code == 2 and "is an image" in ran.err and "Traceback" not in ran.err
    ran = run_hub("train", "lora", "--name", "seen", "--base", base, "--task", task, "--steps", "1")
    assert ran.code == 2 and "is an image" in ran.err and "Traceback" not in ran.err


def test_a_text_that_begins_like_an_image_is_read(base_folder: Path, tmp_path: Path) -> None:
    labels = ["yes", "no"]
    text = "/9j/ is how the base64 of a JPEG begins, which is no reason to take this for one."
    examples = [
        Example(id=example_id(f"{n} {text}", labels), input=text, choices=labels, answer=n % 2)
        for n in range(6)
    ]
    card = Card(name="begins", source="made-up", template="{input}\nAnswer:")
    task = write_task("local", card, examples)
    make_expert(tmp_path / "expert", base_folder, 1)
    recipe = hub.Recipe.of(
        {
            "base": str(base_folder),
            "experts": [str(tmp_path / "expert")],
            "merge": {"method": "linear"},
        }
    )
    assert hub.evaluate({"m": recipe}, [task], split="all")["average"]


def build_blip() -> Any:
    """Build a model that cannot read text without an image."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    vision = {**VISION, "num_attention_heads": 4}
    text = {
        "vocab_size": 131,
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "sep_token_id": 1,
        "pad_token_id": 0,
    }
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


UNREAD: dict[str, tuple[Callable[[Architecture | None], Any], str]] = {
    "Whisper": (lambda one: one.build() if one else None, "reads input features"),
    "DINOv2": (lambda one: one.build() if one else None, "has no labels to choose from"),
    "SigLIP": (lambda one: one.build() if one else None, "the hub reads CLIP alone"),
    "BLIP": (lambda one: build_blip(), "has no labels to choose from"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_bases_that_need_other_inputs_are_refused_by_name(
    name: str, tmp_path: Path, tiny_task: str
) -> None:
    build, reason = UNREAD[name]
    base = tmp_path / "base"
    build(ROWS.get(name)).save_pretrained(base)
    ran = run_hub(
        "train", "lora", "--name", "made", "--base", base, "--task", tiny_task, "--steps", "1"
    )
    assert ran.code == 2 and reason in ran.err, ran.err
