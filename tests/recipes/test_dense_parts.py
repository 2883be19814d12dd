"""Dense parts of adapters (heads, embeddings, biases) in merges and routes, compared with peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.errors import HubError, IntegrityError, UsageError
from peft_models import make_adapter, make_base, run, run_peft
from safetensors.torch import load_file, save_file

CLASSIFIER = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("bert", CLASSIFIER),
    "classifier with a saved pooler": ("bert", CLASSIFIER | {"modules_to_save": ["pooler"]}),
    "classifier with two layers": ("roberta", CLASSIFIER | {"target_modules": ["query", "dense"]}),
    "fused classifier": ("modernbert", CLASSIFIER | {"target_modules": ["Wqkv"]}),
    "decoder-only classifier": ("llama-classifier", CLASSIFIER | {"target_modules": ["q_proj"]}),
    "saved embeddings": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved input of a tied pair": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "saved output of a tied pair": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "saved tied pair": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved and kept tied": (
        "llama-tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved scaled embedding": ("gemma3", {"modules_to_save": ["embed_tokens"]}),
    "saved norms": ("qwen3", {"modules_to_save": ["norm", "q_norm"]}),
    "saved embedding of a Conv1D model": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wte"]},
    ),
    "trained tokens": ("llama", {"trainable_token_indices": [3, 5, 40]}),
    "trained tokens by module": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
    ),
    "trained tokens of a tied pair": ("llama-tied", {"trainable_token_indices": [3, 5, 40]}),
    "trained tokens of a scaled embedding": ("gemma3", {"trainable_token_indices": [3, 5]}),
    "adapted embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "adapted tied pair": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "adapted and kept tied": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved output of an encoder-decoder": (
        "t5",
        {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
    ),
    "trained tokens of an encoder-decoder": (
        "t5",
        {"target_modules": ["q"], "trainable_token_indices": [4, 8]},
    ),
    "saved output of a speech model": ("whisper", {"modules_to_save": ["proj_out"]}),
    "classifier of images": ("vit", {"modules_to_save": ["classifier"]}),
    "all biases": ("llama-bias", {"bias": "all"}),
    "biases of adapted modules": ("llama-bias", {"bias": "lora_only"}),
    "all biases of an encoder": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "biases of a Conv1D model": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "biases of factors": ("qwen2", {"lora_bias": True, "use_rslora": True}),
    "biases of speech layers": ("whisper", {"modules_to_save": ["conv1"], "bias": "all"}),
}


def compose(base: Path, *experts: Path | dict[str, Any], **keys: Any) -> hub.Composition:
    """Compose experts on a base; the default is a linear merge."""
    uses = [str(one) if isinstance(one, Path) else one for one in experts]
    way = {} if "route" in keys or "merge" in keys else {"merge": {"method": "linear"}}
    return hub.compose({"base": str(base), "experts": uses, **way, **keys})


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", CASES)
def test_an_expert_alone_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    kind = make_base(tmp_path / "base", name)
    settings = {"target_modules": ["q_proj"]} | config
    make_adapter(kind, tmp_path / "base", tmp_path / "one", **settings)
    right = run_peft(name, kind, tmp_path / "base", tmp_path / "one")
    plain = run(name, kind.from_pretrained(tmp_path / "base"))
    assert (right - plain).abs().max() > 0.1
    composed = compose(tmp_path / "base", tmp_path / "one")
    torch.testing.assert_close(run(name, composed.model), right, atol=1e-5, rtol=1e-5)
    composed.save(tmp_path / "out")
    loaded = run(name, kind.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(loaded, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["classifier", "adapted embeddings", "biases of factors"])
def test_a_portable_adapter_keeps_its_dense_parts(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    kind = make_base(tmp_path / "base", name)
    settings = {"target_modules": ["q_proj"]} | config
    make_adapter(kind, tmp_path / "base", tmp_path / "one", **settings)
    for words in (
        ("add", tmp_path / "one", "--name", "one"),
        ("export", "one", "--portable", tmp_path / "out"),
    ):
        assert run_hub(*words).code == 0
    right = run_peft(name, kind, tmp_path / "base", tmp_path / "one")
    found = run_peft(name, kind, tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


@pytest.fixture
def heads(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A classifier, and two experts with a head each."""
    base, one, two = (tmp_path / name for name in ("base", "one", "two"))
    kind = make_base(base, "bert")
    make_adapter(kind, base, one, seed=1, **CLASSIFIER)
    make_adapter(kind, base, two, seed=2, **CLASSIFIER)
    return base, one, two


def read_head(folder: Path) -> torch.Tensor:
    """Return the weight of the classifier that a folder stores."""
    (file,) = folder.glob("*model.safetensors")
    stored = load_file(file)
    return next(value for name, value in stored.items() if name.endswith("classifier.weight"))


def test_heads_are_merged_by_the_rule_of_the_method(heads: tuple[Path, Path, Path]) -> None:
    base, one, two = heads
    before, first, second = map(read_head, heads)
    uses = {"expert": str(one), "weight": 0.5}, {"expert": str(two), "weight": 1.5}
    merge = {"method": "task_arithmetic", "scale": 0.4}
    merged = compose(base, *uses, merge=merge).model.classifier.weight
    right = before + 0.4 * (0.5 * (first - before) + 1.5 * (second - before))
    torch.testing.assert_close(merged.detach(), right)


def test_a_head_is_taken_from_the_expert_that_the_recipe_names(
    heads: tuple[Path, Path, Path],
) -> None:
    base, one, two = heads
    for way in ({"merge": {"method": "ties"}}, {"route": {"method": "uniform"}}):
        plain = compose(base, one, two, dense_parts="two", **way)
        torch.testing.assert_close(plain.model.classifier.weight.detach(), read_head(two))
        assert "dense_parts" in plain.lock
    merged = compose(base, one, two, dense_parts="two")
    low = [compose(base, one, two, dense_parts=name).model for name in ("one", "two")]
    torch.testing.assert_close(run("bert", low[1]), run("bert", merged.model))
    assert (run("bert", low[0]) - run("bert", low[1])).abs().max() > 0.1
    query = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(*(m.get_submodule(query).weight for m in low))


def test_routes_take_equal_heads_and_refuse_different_ones(
    heads: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, two = heads
    route = {"method": "uniform"}
    with pytest.raises(HubError, match="one and two have different classifier") as found:
        compose(base, one, two, route=route)
    assert "dense_parts: one" in (found.value.hint or "")
    weights = load_file(two / "adapter_model.safetensors")
    own = load_file(one / "adapter_model.safetensors")
    same = {n: own[n] if "classifier" in n else value for n, value in weights.items()}
    save_file(same, two / "adapter_model.safetensors")
    routed = compose(base, one, two, route=route)
    merged = compose(base, one, two)
    torch.testing.assert_close(
        run("bert", routed.model), run("bert", merged.model), atol=1e-5, rtol=1e-5
    )
    right = run_peft("bert", type(merged.model), base, one)
    alone = compose(base, one, route=route)
    torch.testing.assert_close(run("bert", alone.model), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_route_is_detached_from_its_dense_parts(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    kind = make_base(base, name)
    config = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [4, 9]}
    make_adapter(kind, base, tmp_path / "one", **config)
    right = run_peft(name, kind, base, tmp_path / "one")
    routed = compose(base, tmp_path / "one", route={"method": "uniform"})
    torch.testing.assert_close(run(name, routed.model), right, atol=1e-5, rtol=1e-5)
    model = routed.detach()
    before = kind.from_pretrained(base)
    assert torch.equal(run(name, model), run(name, before))
    assert model.config.tie_word_embeddings == before.config.tie_word_embeddings
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "llama-tied")


@pytest.mark.parametrize("key", [{"dense_parts": "three"}, {"dense_parts": "plain"}])
def test_dense_parts_of_no_expert_are_refused(
    key: dict[str, str], heads: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, _ = heads
    kind = make_base(base, "bert")
    make_adapter(kind, base, tmp_path / "plain", target_modules=["query"])
    with pytest.raises(UsageError, match="dense_parts"):
        compose(base, one, tmp_path / "plain", **key)


@pytest.fixture
def headless(heads: tuple[Path, Path, Path]) -> tuple[Path, Path, Path]:
    """The same base without the weights of its head, as peft meets it before training."""
    weights = load_file(heads[0] / "model.safetensors")
    rest = {name: value for name, value in weights.items() if "classifier" not in name}
    save_file(rest, heads[0] / "model.safetensors", metadata={"format": "pt"})
    return heads


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_head_that_the_base_lacks_comes_from_the_expert(
    method: str, headless: tuple[Path, Path, Path]
) -> None:
    base, one, _ = headless
    composed = compose(base, one, merge={"method": method})
    assert torch.equal(composed.model.classifier.weight, read_head(one))
    if method == "linear":
        right = run_peft("bert", type(composed.model), base, one)
        torch.testing.assert_close(run("bert", composed.model), right, atol=1e-5, rtol=1e-5)


def test_different_heads_that_the_base_lacks_need_a_choice(
    headless: tuple[Path, Path, Path],
) -> None:
    base, one, two = headless
    with pytest.raises(HubError, match="the base lacks it"):
        compose(base, one, two)
    taken = compose(base, one, two, dense_parts="two").model
    assert torch.equal(taken.classifier.weight, read_head(two))


def test_a_base_that_lacks_what_no_expert_has_is_refused(
    headless: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = headless[0]
    make_adapter(make_base(tmp_path / "whole", "bert"), tmp_path / "whole", tmp_path / "plain",
                 target_modules=["query"])  # fmt: skip
    with pytest.raises(IntegrityError, match="lack 2 of the weights"):
        compose(base, tmp_path / "plain")


def test_copies_of_the_base_are_dropped_with_a_note(tmp_path: Path) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, "llama")
    make_adapter(kind, base, one, target_modules=["q_proj", "lm_head"])
    assert any("base_layer" in name for name in load_file(one / "adapter_model.safetensors"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{one}]\nroute: {{method: uniform}}\n")
    found = run_hub("compose", recipe)
    assert found.code == 0, found.err
    assert "repeat weights of the base" in found.err
    right = run_peft("llama", kind, base, one)
    routed = hub.compose(recipe).model
    torch.testing.assert_close(run("llama", routed), right, atol=1e-5, rtol=1e-5)


def test_changed_copies_of_the_base_count(tmp_path: Path) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, "llama-tied")
    make_adapter(kind, base, one, target_modules=["q_proj", "embed_tokens"])
    file = one / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("base_layer.weight"))
    weights[name] += 0.2
    save_file(weights, file)
    right = run_peft("llama-tied", kind, base, one)
    composed = compose(base, one).model
    torch.testing.assert_close(run("llama-tied", composed), right, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a new bias": ("llama", {"lora_bias": True}, "no such parameter"),
    "a head on a language model": ("llama", {"modules_to_save": ["score"]}, "no such parameter"),
    "an embedding of two towers": (
        "t5",
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
        "modules, and an adapter changes one of them",
    ),
    "a head of another size": ("bert", {"modules_to_save": ["classifier"]}, "classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dense_parts_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    name, config, message = REFUSED[case]
    base, one = tmp_path / "base", tmp_path / "one"
    kind = make_base(base, name)
    target = "query" if name == "bert" else "q_proj"
    make_adapter(kind, base, one, **({"target_modules": [target]} | config))
    file = one / "adapter_model.safetensors"
    weights = load_file(file)
    if "score" in config.get("modules_to_save", ()):
        weights["base_model.model.score.weight"] = torch.ones(3, 32)
    for tensor in [n for n in weights if "classifier" in n]:
        weights[tensor] = torch.cat([weights[tensor]] * 2)
    save_file(weights, file)
    with pytest.raises(HubError, match=message) as found:
        compose(base, one)
    assert found.value.hint


def test_a_head_that_the_base_lacks_has_the_hint_for_heads(tmp_path: Path) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    make_adapter(make_base(base, "llama"), base, one, target_modules=["q_proj"])
    file = one / "adapter_model.safetensors"
    head = {f"base_model.model.classifier.{n}": torch.ones(3) for n in ("bias", "weight")}
    save_file(load_file(file) | head, file)
    with pytest.raises(HubError, match="no such parameter") as found:
        compose(base, one)
    assert "saved in the class of its task" in (found.value.hint or "")


UNUSED = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (f"{UNUSED}.weight", "peft would not load"),
        (f"{UNUSED}.lora_magnitude_vector", "not a part of a plain LoRA"),
        ("model.norm.weight", "not a part of a plain LoRA"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "trainable_token_indices lists 0",
        ),
    ],
)
def test_tensors_that_peft_does_not_load_are_refused(
    tensor: str, message: str, tmp_path: Path
) -> None:
    base, one = tmp_path / "base", tmp_path / "one"
    make_adapter(make_base(base, "llama"), base, one, target_modules=["q_proj"])
    file = one / "adapter_model.safetensors"
    save_file(load_file(file) | {tensor: torch.ones(2, 32)}, file)
    with pytest.raises(IntegrityError, match=message):
        compose(base, one)
