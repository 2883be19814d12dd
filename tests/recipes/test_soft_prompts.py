"""Soft prompts and prefixes, composed by the hub, against peft in float64 on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_LABEL, Architecture
from experthub import hub
from experthub.hub.errors import UsageError
from soft_prompts import load_peft, write_adapter

CAUSAL = ("Llama", "Qwen3", "GPT-2", "Gemma 3 (text)", "OPT", "GPT-NeoX", "BLOOM, as published")
KINDS = ("prompt", "p-tuning", "prefix")


def change(label: str, name: str, **settings: object) -> Architecture:
    """Return an architecture with another name and other settings."""
    return replace(BY_LABEL[label], label=name, settings=BY_LABEL[label].settings | settings)


MODELS = {label: BY_LABEL[label] for label in CAUSAL} | {
    "Gemma 3 (text)": change("Gemma 3 (text)", "wide", sliding_window=64),
    # A window that the rows of the tests exceed.
    "sliding": change("Gemma 3 (text)", "sliding", sliding_window=6),
    # A prompt of peft is as wide as the layers, so that it fits no narrower embedding.
    "OPT": change("OPT", "even", word_embed_proj_dim=32),
}
ROWS = ([5, 77, 30, 9, 100, 33, 41], [8, 12, 60], [17, 18, 19, 20, 21])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that saves the base of an architecture once."""
    made: dict[str, Path] = {}

    def get(one: Architecture) -> Path:
        if one.label not in made:
            made[one.label] = one.save(tmp_path_factory.mktemp("base") / "model")
        return made[one.label]

    return get


def concatenated(base: Path, *folders: Path) -> Any:
    """The composition of soft prompts, in float64."""
    recipe = {
        "base": str(base),
        "experts": [str(folder) for folder in folders],
        "merge": {"method": "concatenate"},
    }
    composition = hub.compose(recipe)
    composition.model.double()
    return composition


def padded(left: bool) -> dict[str, torch.Tensor]:
    """The rows as one batch, with padding on one side."""
    width = max(map(len, ROWS))
    fill = [[0] * (width - len(row)) for row in ROWS]
    ids = [[*f, *r] if left else [*r, *f] for f, r in zip(fill, ROWS, strict=True)]
    ones = [[1] * len(row) for row in ROWS]
    mask = [[*f, *o] if left else [*o, *f] for f, o in zip(fill, ones, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def alone(model: Any, row: list[int], count: int = 0) -> torch.Tensor:
    """The logits `[S, V]` of a row alone, behind `count` virtual tokens."""
    with torch.no_grad():
        ids = torch.tensor([row])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, count:]


def settings(model: Any) -> dict[str, Any]:
    return {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", MODELS)
def test_is_what_peft_computes(
    label: str, kind: str, bases: Any, tmp_path: Path, home: Path
) -> None:
    one = MODELS[label]
    base = bases(one)
    folder = write_adapter(one.load, base, tmp_path / "a", kind=kind)
    count = 0 if kind == "prefix" else 4
    theirs, ours = load_peft(one.load, base, folder), concatenated(base, folder).model
    plain = one.load(base)
    for row in map(list, ROWS):
        right, found = alone(theirs, row, count), alone(ours, row)
        assert found.shape == right.shape
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
        assert float((alone(plain, row) - right).abs().max()) > 1e-3  # The prompt does something.
        ids = torch.tensor([row])
        with torch.no_grad():
            last = ours(input_ids=ids, logits_to_keep=1).logits
        torch.testing.assert_close(last[0, -1], right[-1], rtol=0, atol=1e-9)
        written = ours.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **settings(ours)
        )
        wanted = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **settings(ours)
        )
        assert written.tolist() == wanted.tolist()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("label", MODELS)
def test_a_row_depends_on_that_row_only(
    label: str, kind: str, bases: Any, tmp_path: Path, home: Path
) -> None:
    one = MODELS[label]
    base = bases(one)
    model = concatenated(base, write_adapter(one.load, base, tmp_path / "a", kind=kind)).model
    refused = label == "sliding" and kind == "prefix"
    # Transformers' BLOOM computes NaN for rows with padding on the left, soft prompts or not.
    for left in (False, True) if "BLOOM" not in label else (False,):
        batch = padded(left)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        takes = "BLOOM" not in label
        for more in ({}, {"position_ids": positions} if takes else {}):
            if left and refused:
                with pytest.raises(UsageError, match="sliding window"):
                    model(**batch, **more)
                continue
            with torch.no_grad():
                found = model(**batch, **more).logits
            for row, own, mask in zip(ROWS, found, batch["attention_mask"], strict=True):
                torch.testing.assert_close(
                    own[mask.bool()], alone(model, list(row)), rtol=0, atol=1e-9
                )
    if refused or "BLOOM" in label:
        return
    written = model.generate(**padded(True), **settings(model))
    beams = model.generate(**padded(True), **settings(model), num_beams=3)
    for row, own, best in zip(ROWS, written, beams, strict=True):
        ids = torch.tensor([list(row)])
        single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **settings(model)}
        assert own[-6:].tolist() == model.generate(**single)[0, -6:].tolist()
        assert best[-6:].tolist() == model.generate(**single, num_beams=3)[0, -6:].tolist()


@pytest.mark.parametrize("label", MODELS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_steps_with_a_cache_and_without(
    label: str, kind: str, bases: Any, tmp_path: Path, home: Path
) -> None:
    one = MODELS[label]
    base = bases(one)
    model = concatenated(base, write_adapter(one.load, base, tmp_path / "a", kind=kind)).model
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        read = model(input_ids=ids[:, :3], use_cache=True)
        more = model(input_ids=ids[:, 3:5], past_key_values=read.past_key_values, use_cache=True)
        last = model(input_ids=ids[:, 5:], past_key_values=more.past_key_values, use_cache=True)
        steps = torch.cat([read.logits, more.logits, last.logits], 1)
        hidden = model.base_model(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-9)
    assert {tuple(h.shape[:2]) for h in hidden.hidden_states} == {tuple(ids.shape)}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_concatenation_is_peft_with_both(kind: str, bases: Any, tmp_path: Path, home: Path) -> None:
    one = BY_LABEL["Llama"]
    base = bases(one)
    a = write_adapter(one.load, base, tmp_path / "a", kind=kind, tokens=4, seed=1)
    b = write_adapter(one.load, base, tmp_path / "b", kind=kind, tokens=3, seed=2)
    composition = concatenated(base, a, b)
    saved = composition.save(tmp_path / "both", format="peft")
    theirs = load_peft(one.load, base, saved)
    assert theirs.peft_config["default"].num_virtual_tokens == 7
    from safetensors.torch import load_file

    rows = [load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in (a, b, saved)]
    assert torch.equal(torch.cat(rows[:2]), rows[2])
    for row in map(list, ROWS):
        right = alone(theirs, row, 0 if kind == "prefix" else 7)
        torch.testing.assert_close(alone(composition.model, row), right, rtol=0, atol=1e-9)
    with pytest.raises(UsageError, match="no merged model"):
        composition.save(tmp_path / "merged")
    model = composition.detach()
    plain = one.load(base)
    for row in map(list, ROWS):
        assert torch.equal(alone(model, row), alone(plain, row))


@pytest.mark.parametrize("label", ["T5", "BART"])
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_encoder_decoders(label: str, kind: str, bases: Any, tmp_path: Path, home: Path) -> None:
    one = BY_LABEL[label]
    base = bases(one)
    folder = write_adapter(one.load, base, tmp_path / "a", kind=kind, task_type="SEQ_2_SEQ_LM")
    theirs, ours = load_peft(one.load, base, folder), concatenated(base, folder).model
    batch = padded(False)
    answers = torch.tensor([[0, 5, 9], [0, 7, 8], [0, 4, 4]])
    with torch.no_grad():
        right = theirs(**batch, decoder_input_ids=answers).logits
        found = ours(**batch, decoder_input_ids=answers).logits
        states = ours.get_encoder()(**batch).last_hidden_state
        again = ours(
            encoder_outputs=(states,),
            attention_mask=batch["attention_mask"],
            decoder_input_ids=answers,
        ).logits
    torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
    torch.testing.assert_close(again, right, rtol=0, atol=1e-9)
    for more in ({}, {"num_beams": 3}):
        wanted = theirs.generate(**batch, **settings(ours), **more)
        assert ours.generate(**batch, **settings(ours), **more).tolist() == wanted.tolist()


def test_a_prefix_of_compressed_attention_is_refused(
    bases: Any, tmp_path: Path, home: Path
) -> None:
    """peft writes one, and cannot compute with it."""
    one = BY_LABEL["DeepSeek-V3"]
    folder = write_adapter(one.load, bases(one), tmp_path / "a", kind="prefix")
    with pytest.raises(UsageError, match="compresses its keys and values"):
        concatenated(bases(one), folder)


def test_caches_and_masks_that_are_refused(bases: Any, tmp_path: Path, home: Path) -> None:
    one = BY_LABEL["Llama"]
    base = bases(one)
    model = concatenated(base, write_adapter(one.load, base, tmp_path / "a")).model
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(UsageError, match="cache that grows"):
        model.generate(input_ids=ids, cache_implementation="static", **settings(model))
    with torch.no_grad():
        cache = one.load(base)(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="filled by another model"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(UsageError, match="attention mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 7, 7))
