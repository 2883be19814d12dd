"""Experts with added tokens and resized embeddings, compared with peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.generation import generate_text
from experthub.hub.errors import HubError
from peft_models import make_adapter, make_base, run, run_peft
from safetensors.torch import load_file
from test_dense_parts import compose

V = 60


def write_tokenizer(folder: Path, *added: str, count: int = V) -> Any:
    """Write a tokenizer of single letters, with some added tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(33 + i) for i in range(count - 4))]
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens([*added], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


EMBEDDINGS = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "saved embeddings": ("llama", V + 2, {"modules_to_save": EMBEDDINGS}),
    "saved tied embeddings": ("llama-tied", V + 2, {"modules_to_save": EMBEDDINGS}),
    "saved scaled embeddings": ("gemma3", V + 2, {"modules_to_save": EMBEDDINGS}),
    "padded to a multiple of 64": ("llama", 64, {"modules_to_save": EMBEDDINGS}),
    "cut to fewer rows": ("llama", V - 4, {"modules_to_save": EMBEDDINGS}),
    "adapted embeddings": ("llama", V + 2, {"target_modules": ["q_proj", *EMBEDDINGS]}),
    "adapted tied embedding": ("llama-tied", V + 2, {"target_modules": ["q_proj", "embed_tokens"]}),
    "trained new tokens": ("llama-tied", V + 2, {"trainable_token_indices": [3, V, V + 1]}),
    "a Conv1D model": (
        "gpt2",
        V + 2,
        {
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "modules_to_save": ["wte", "lm_head"],
        },
    ),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("way", [{"merge": {"method": "linear"}}, {"route": {"method": "uniform"}}])
@pytest.mark.parametrize("case", CASES)
def test_a_resized_expert_alone_computes_what_peft_computes(
    case: str, way: dict[str, Any], tmp_path: Path
) -> None:
    name, rows, config = CASES[case]
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, name)
    write_tokenizer(base)
    make_adapter(kind, base, one, rows=rows, **({"target_modules": ["q_proj"]} | config))
    tokenizer = write_tokenizer(one, "<a>", "<b>")
    right = run_peft(name, kind, base, one, rows=rows)
    if "adapted" in case and "route" in way:
        if "tied" in case:
            return  # An input embedding cannot be routed.
        way = way | {"targets": r".*(q_proj|lm_head)"}
        return
    composed = compose(base, one, **way)
    found = run(name, composed.model)
    seen = min(rows, V + 2) if "padded" not in case else rows
    torch.testing.assert_close(found[..., :seen], right[..., :seen], atol=1e-5, rtol=1e-5)
    if rows >= V + 2:
        own = load_tokenizer(composed.plan.base)
        assert own("!<a><b>")["input_ids"] == tokenizer("!<a><b>")["input_ids"]
        with torch.no_grad():
            ids = torch.tensor([[5, V, V + 1, 7]])
            assert bool(torch.isfinite(composed.model(ids).logits).all())
    before = run(name, kind.from_pretrained(base))
    if "route" in way:
        assert torch.equal(run(name, composed.detach()), before)
        return
    composed.save(tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(name, loaded), found)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Any, Path, Path, Path]:
    """Two experts that each add tokens of their own, one of them common, at the same ids."""
    base, one, other = (tmp_path / name for name in ("base", "one", "other"))
    kind = make_base(base, "llama")
    write_tokenizer(base)
    config = {"target_modules": ["q_proj"], "modules_to_save": EMBEDDINGS, "rows": V + 2}
    make_adapter(kind, base, one, seed=1, **config)
    make_adapter(kind, base, other, seed=2, **config)
    write_tokenizer(one, "<a>", "<both>")
    write_tokenizer(other, "<both>", "<b>")
    return kind, base, one, other


def read(folder: Path, name: str) -> torch.Tensor:
    """Return a tensor of an adapter."""
    return load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}.weight"]


def test_vocabularies_are_united_by_token(two: tuple[Any, Path, Path, Path]) -> None:
    _, base, one, other = two
    merged = compose(base, one, other)
    tokenizer = load_tokenizer(merged.plan.base)
    assert tokenizer("<a><both><b>")["input_ids"] == [V, V + 1, V + 2]
    for name in ("model.embed_tokens", "lm_head"):
        weight = merged.model.get_parameter(f"{name}.weight").detach()
        first, second = read(one, name), read(other, name)
        assert len(weight) == V + 3
        torch.testing.assert_close(weight[V], first[V])
        torch.testing.assert_close(weight[V + 1], (first[V + 1] + second[V]) / 2)
        torch.testing.assert_close(weight[V + 2], second[V + 1])
        torch.testing.assert_close(weight[:V], (first[:V] + second[:V]) / 2)


def test_an_expert_that_lacks_a_token_does_not_change_it(
    two: tuple[Any, Path, Path, Path], tmp_path: Path
) -> None:
    kind, base, one, _ = two
    make_adapter(kind, base, tmp_path / "plain", target_modules=["q_proj"])
    merged = compose(base, one, tmp_path / "plain", merge={"method": "task_arithmetic"})
    torch.testing.assert_close(merged.model.lm_head.weight[V:].detach(), read(one, "lm_head")[V:])
    model = kind.from_pretrained(base)
    model.resize_token_embeddings(V + 2)
    assert model.lm_head.weight.shape == merged.model.lm_head.weight.shape


def test_tokens_are_taken_from_one_expert_of_a_route(two: tuple[Any, Path, Path, Path]) -> None:
    _, base, one, other = two
    with pytest.raises(HubError, match="different"):
        compose(base, one, other, route={"method": "uniform"})
    routed = compose(base, one, other, route={"method": "uniform"}, dense_parts="other")
    weight = routed.model.lm_head.weight.detach()
    torch.testing.assert_close(weight[[V + 1, V + 2]], read(other, "lm_head")[V:])
    torch.testing.assert_close(weight[:V], read(other, "lm_head")[:V])


def test_rows_without_a_tokenizer_conflict_by_name(two: tuple[Any, Path, Path, Path]) -> None:
    _, base, one, other = two
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).unlink()
    with pytest.raises(HubError, match=f"have a row {V}") as found:
        compose(base, one, other)
    assert "tokenizer" in (found.value.hint or "")


def test_a_token_in_the_place_of_a_reserved_one_gets_a_place_of_its_own(tmp_path: Path) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, "llama")
    write_tokenizer(base)
    make_adapter(kind, base, one, target_modules=["q_proj"], modules_to_save=EMBEDDINGS)
    write_tokenizer(one)
    content = json.loads((one / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["id"] == 2:
            token["content"] = "<tool>"
    (one / "tokenizer.json").write_text(json.dumps(content))
    (one / "tokenizer_config.json").unlink()
    merged = compose(base, one)
    assert load_tokenizer(merged.plan.base)("<tool>")["input_ids"] == [V]
    weight, saved = merged.model.lm_head.weight.detach(), read(one, "lm_head")
    torch.testing.assert_close(weight[V], saved[2])
    torch.testing.assert_close(weight[2], kind.from_pretrained(base).lm_head.weight[2].detach())
    torch.testing.assert_close(weight[3:V], saved[3:])


@pytest.mark.parametrize("way", [{"merge": {"method": "linear"}}, {"route": {"method": "uniform"}}])
def test_a_saved_input_embedding_leaves_the_tied_output_of_reserved_rows(
    way: dict[str, Any], tmp_path: Path
) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, "llama-tied")
    write_tokenizer(base, count=V - 2)
    make_adapter(kind, base, one, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    right = run_peft("llama-tied", kind, base, one, rows=V)
    write_tokenizer(one, "<a>", "<b>", count=V - 2)
    composed = compose(base, one, **way)
    found = run("llama-tied", composed.model)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    if "merge" in way:
        composed.save(tmp_path / "out")
        saved = run("llama-tied", kind.from_pretrained(tmp_path / "out"))
        torch.testing.assert_close(saved, right, atol=1e-5, rtol=1e-5)


def test_the_added_tokens_are_generated_evaluated_and_exported(
    two: tuple[Any, Path, Path, Path], tmp_path: Path, tiny_task: str
) -> None:
    kind, base, one, _ = two
    found = run_hub("add", one, "--name", "mine", "--base", base)
    assert found.code == 0, found.err
    assert found.lines("equal to peft"), found.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nexperts: [mine]\nmerge: {{method: linear}}\n")
    composed = hub.compose(recipe)
    assert generate_text(composed, "<a>!", max_new_tokens=3) is not None
    assert run_hub("eval", recipe, "--tasks", tiny_task, "--limit", "3", "--json").code == 0
    assert run_hub("compose", recipe, "--out", tmp_path / "out").code == 0
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<a>")["input_ids"] == [V]
    assert kind.from_pretrained(tmp_path / "out").config.vocab_size == V + 2


def test_files_of_a_tokenizer_belong_to_experts_with_embeddings_only(
    two: tuple[Any, Path, Path, Path], tmp_path: Path
) -> None:
    kind, base, one, _ = two
    make_adapter(kind, base, tmp_path / "plain", target_modules=["q_proj"])
    plain = run_hub("add", tmp_path / "plain", "--name", "plain", "--no-proof", "--json").json
    shutil.copy(one / "tokenizer.json", tmp_path / "plain")
    again = run_hub("add", tmp_path / "plain", "--name", "plain", "--no-proof", "--json").json
    assert plain["expert"]["digest"] == again["expert"]["digest"]


def test_huge_indices_of_tokens_are_refused(tmp_path: Path) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, "llama")
    make_adapter(kind, base, one, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    config = json.loads((one / "adapter_config.json").read_text())
    config["trainable_token_indices"] = [3, 2**30]
    (one / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match="row 1073741824"):
        compose(base, one)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_fine_tuned_model_with_more_tokens_has_a_difference(name: str, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    kind = make_base(base, name)
    write_tokenizer(base)
    model = kind.from_pretrained(base)
    model.resize_token_embeddings(V + 2, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tuned)
    write_tokenizer(tuned, "<a>", "<b>")
    found = run_hub("diff", base, tuned, "--name", "mine")
    assert found.code == 0, found.err
    for wrong in (("--rank", "4"), ("--sparse", "0.5")):
        refused = run_hub("diff", base, tuned, "--name", "other", *wrong)
        assert refused.code == 2, refused.err
    composed = hub.compose({"base": str(base), "experts": ["mine"], "merge": {"method": "linear"}})
    torch.testing.assert_close(run(name, composed.model), run(name, model), atol=1e-5, rtol=1e-5)
    ids = torch.tensor([[5, V, V + 1, 7]])
    with torch.no_grad():
        right, logits = model(ids).logits, composed.model(ids).logits
    torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)
    tokenizer = load_tokenizer(composed.plan.base)
    assert tokenizer("<a><b>")["input_ids"] == [V, V + 1]
    assert tokenizer.decode([V, 5], skip_special_tokens=True) == tokenizer.decode([5])
