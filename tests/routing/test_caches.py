"""Routers that decide for whole rows, with every kind of cache and of mask, on several architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_llama
from every_router import TASKS, make_recipe
from experthub import hub
from experthub.hub.composition.assembly import assemble
from experthub.hub.composition.real_tokens import find_real_tokens
from experthub.hub.errors import UsageError
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from experthub.routing import State, routers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import StaticCache

BY_ROW = ("smear", "retrieval", "lora_retriever", "task")
BASES = ("llama", "gemma3", "deepseek_v3", "lfm2", "mamba")
LENGTHS = (9, 5, 2)
NEW = 5  # The number of generated tokens.


@pytest.fixture(scope="session", params=BASES)
def other_base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of one architecture, with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    ARCHITECTURES[request.param].build().save_pretrained(folder)
    for file in tiny_llama(tmp_path_factory.mktemp("tokenizer")).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def other_expert(other_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a random LoRA of every linear module of the base, with gates."""

    def make(seed: int) -> Path:
        random = torch.Generator().manual_seed(seed)
        tensors, gates = {}, {}
        for name, weight in load_file(other_base / "model.safetensors").items():
            module = name.removesuffix(".weight")
            if module == name or "proj" not in module or ".experts." in module or weight.ndim != 2:
                continue
            key = f"base_model.model.{module}"
            outputs, inputs = weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, inputs, generator=random) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 3, generator=random) * 0.2
            gates[f"{module}.gate"] = torch.randn(inputs, generator=random)
        folder = tmp_path / f"expert-{seed}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        save_file(gates, folder / "phatgoose_gates.safetensors")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6}
        more = {"target_modules": "all-linear", "bias": "none", "base_model_name_or_path": "x"}
        (folder / "adapter_config.json").write_text(json.dumps(settings | more))
        return folder

    return make


class Generated(NamedTuple):
    """Generated tokens `[B, NEW]`, and the logits of the first two `[B, 2, V]`."""

    ids: Tensor
    logits: Tensor


@torch.no_grad()
def generate(composition: Any, ids: Tensor, mask: Tensor, tasks: list[str], **more: Any) -> Any:
    """Generate greedily; a router by task is told the task of each row."""
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    shown = {"output_logits": True, "return_dict_in_generate": True}
    with composition.tasks(tasks):
        found = composition.model.generate(
            input_ids=ids, attention_mask=mask, **fixed, **shown, **more
        )
    return Generated(found.sequences[:, ids.shape[1] :], torch.stack(found.logits[:2], 1))


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length in one batch, and the mask of their tokens."""
    width = max(map(len, rows))
    batch, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return batch, mask


@pytest.fixture(params=BY_ROW)
def by_row(request: Any, other_base: Path, other_expert: Any, tmp_path: Path) -> Any:
    """A composition whose router decides for whole rows."""
    return hub.compose(make_recipe(routers[request.param], other_base, other_expert, tmp_path))


def make_rows() -> tuple[list[Tensor], list[str]]:
    """Return prompts of several lengths and their tasks."""
    random = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, 250, (n,), generator=random) for n in LENGTHS]
    return rows, [TASKS[i % 2] for i in range(len(rows))]


@pytest.mark.sampled(5)
def test_padding_and_caches_change_nothing(by_row: Any, other_base: Path) -> None:
    rows, tasks = make_rows()
    alone = [
        generate(by_row, row[None], torch.ones(1, len(row), dtype=torch.long), [task])
        for row, task in zip(rows, tasks, strict=True)
    ]
    settings: list[dict[str, Any]] = [{}, {"prefill_chunk_size": 2}]
    if "mamba" not in str(other_base):  # Its cache has no fixed size, and reads no chunks.
        settings += [{"cache_implementation": "static"}]
    else:
        settings.pop()
    for more in settings:
        found = generate(by_row, *pad_left(rows), tasks, **more)
        for i, one in enumerate(alone):
            assert torch.equal(found.ids[i], one.ids[0]), more
            torch.testing.assert_close(found.logits[i], one.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(5)
def test_beams_keep_the_choice_of_their_row(by_row: Any) -> None:
    rows, tasks = make_rows()
    found = generate(by_row, *pad_left(rows[:2]), tasks[:2], num_beams=2)
    for i in range(2):
        mask = torch.ones(1, len(rows[i]), dtype=torch.long)
        alone = generate(by_row, rows[i][None], mask, tasks[i : i + 1], num_beams=2)
        assert torch.equal(found.ids[i], alone.ids[0])


@pytest.mark.sampled(5)
@torch.no_grad()
def test_every_form_of_mask_shows_padding(by_row: Any, other_base: Path) -> None:
    if not any(name in str(other_base) for name in ("llama", "deepseek")):
        pytest.skip("one mask for all layers is not what this architecture reads")
    rows, tasks = make_rows()
    ids, mask = pad_left(rows)
    places = torch.arange(ids.shape[1])
    pairs = (places[:, None] >= places[None])[None, None] & mask[:, None, None].bool()
    added = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    longer = torch.cat([mask, torch.zeros(3, 4, dtype=torch.long)], 1)  # For a cache of fixed size.
    found = {}
    for name, form in {"2": mask, "pairs": pairs, "added": added}.items():
        with by_row.tasks(tasks):
            out = by_row.model(input_ids=ids, attention_mask=form, position_ids=positions)
        found[name] = out.logits[:, -1]
        torch.testing.assert_close(found[name], found["2"], atol=1e-5, rtol=1e-5)
    by_type = {"full": None, "sliding": pairs}
    for form in (mask, pairs, added, pairs[:, 0], longer, by_type):
        assert torch.equal(find_real_tokens(form, None, None, *ids.shape), mask.bool())


@pytest.mark.sampled(7)
def test_packed_rows_are_refused(by_row: Any, other_base: Path) -> None:
    if "mamba" in str(other_base):
        pytest.skip("this architecture reads no positions")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(UsageError, match="several sequences into one row"):
        by_row.model(input_ids=torch.ones(1, 5, dtype=torch.long), position_ids=positions)


@torch.no_grad()
def test_weights_by_token_serve_modules_that_expand_the_whole_cache(
    other_base: Path, other_expert: Any, tmp_path: Path
) -> None:
    """DeepSeek's kv_b_proj reads the latents of all tokens at each step."""
    recipe = make_recipe(routers["xlora"], other_base, other_expert, tmp_path)
    plan = resolve(Recipe.of(recipe))
    random = torch.Generator().manual_seed(2)
    outputs = 2 * len(plan.layers)
    state = State(
        {
            "classifier.0.weight": torch.randn(outputs, 32, generator=random),
            "classifier.0.bias": torch.randn(outputs, generator=random),
        }
    )
    model = assemble(plan, Session(), state).model
    ids = torch.randint(5, 250, (2, 12), generator=random)
    whole = model(input_ids=ids, use_cache=False).logits
    for chunks in ([7, 1, 1, 1, 1, 1], [12]):
        cache, found = None, []
        for part in ids.split(chunks, 1):
            # Mamba's name for its cache differs.
            name = "cache_params" if "mamba" in str(other_base) else "past_key_values"
            out = model(input_ids=part, use_cache=True, **{name: cache})
            cache, found = out[name], [*found, out.logits]
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
    if "mamba" not in str(other_base):
        cache = StaticCache(model.config, max_cache_len=20)
        found = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split([7, 1, 1, 1, 1, 1], 1)
        ]
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(7)
@pytest.mark.slow
@torch.no_grad()
def test_one_graph_follows_texts_and_tasks(by_row: Any, other_base: Path) -> None:
    if "llama" not in str(other_base):
        pytest.skip("one architecture is enough")
    tasks = make_rows()[1]
    compiled = torch.compile(by_row.model, backend="eager", fullgraph=True)
    for order in (tasks, tasks[::-1], tasks):
        for seed in (1, 2):
            random = torch.Generator().manual_seed(seed)
            ids = torch.randint(5, 250, (3, 8), generator=random)
            with by_row.tasks(order):
                found = compiled(input_ids=ids, use_cache=False).logits
                wanted = by_row.model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
