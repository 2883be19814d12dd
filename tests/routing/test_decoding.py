"""The output of a routed model does not depend on how its input is split or padded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experthub import hub
from experthub.hub.errors import UsageError
from experthub.hub.recipes.lock import compute_recipe_digest
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from torch import Tensor

Make = Callable[..., Path]
METHODS = [
    {"method": "phatgoose", "top_k": 2},
    {"method": "arrow", "top_k": 1},
    {"method": "arrow", "top_k": 2, "combine": "parameters"},
    {"method": "uniform"},
]


@pytest.fixture(params=METHODS, ids=lambda m: "-".join(map(str, m.values())))
def model(request: Any, base_folder: Path, expert_folder: Make) -> Any:
    return hub.compose(
        {
            "base": str(base_folder),
            "experts": [{"expert": str(expert_folder(seed)), "weight": 0.2} for seed in (1, 2, 3)],
            "route": request.param,
        }
    ).model


def ids(count: int, length: int) -> Tensor:
    return torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_kernels_are_measured_once_and_can_be_said(
    base_folder: Path, expert_folder: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experthub.hub.composition import kernels

    experts = [str(expert_folder(seed, rank=16, size=0.1)) for seed in (1, 2)]
    recipe = {"base": str(base_folder), "experts": experts}
    route = {"method": "arrow", "top_k": 1}
    tokens = ids(2, 24)
    first = hub.compose({**recipe, "route": route}).model(input_ids=tokens).logits
    file = home / "kernels" / "measured.json"
    kept = file.read_text()
    assert '"all"' in kept and "2x16" in kept
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "measure_kernels", lambda group: pytest.fail("measured again"))
        again = hub.compose({**recipe, "route": route}).model(input_ids=tokens).logits
    assert torch.equal(first, again) and file.read_text() == kept
    for kernel, record in (("all", "all"), ("gather", "copied"), ("sampled", "sampled")):
        composition = hub.compose({**recipe, "route": {**route, "kernel": kernel}})
        torch.testing.assert_close(
            composition.model(input_ids=tokens).logits, first, atol=1e-4, rtol=1e-4
        )
        assert composition.lock["route"]["kernel"] == record
    for damaged in ("{", '{"x": 1}', kept.replace('"all"', '"slow"')):
        file.write_text(damaged)
        hub.compose({**recipe, "route": route})
        assert "2x16" in file.read_text() and "slow" not in file.read_text()
    with pytest.raises(UsageError, match="sampled is for float32 on a CPU, and this is bfloat16"):
        hub.compose({**recipe, "dtype": "bfloat16", "route": {**route, "kernel": "sampled"}})
    with pytest.raises(UsageError, match="expected auto, all, gather, sampled or prefilter"):
        hub.compose({**recipe, "route": {**route, "kernel": "fast"}})


def test_an_earlier_name_of_a_kernel_is_the_same_kernel(
    base_folder: Path, expert_folder: Make, tmp_path: Path
) -> None:
    experts = [str(expert_folder(seed)) for seed in (1, 2)]
    notes: list[str] = []
    session = Session(report=lambda what, done, size: notes.append(what))
    found = {}
    for kernel in ("copied", "gather", "screened", "prefilter"):
        path = tmp_path / f"{kernel}.yaml"
        route = {"method": "arrow", "top_k": 1, "kernel": kernel}
        path.write_text(
            yaml.safe_dump({"base": str(base_folder), "experts": experts, "route": route})
        )
        plan = resolve(Recipe.read(path), session=session)
        found[kernel] = plan.digest, plan.lock, compute_recipe_digest(path)
    assert found["copied"] == found["gather"] != found["prefilter"] == found["screened"]
    assert [note for note in notes if note.startswith("note: kernel")] == [
        "note: kernel: copied is now called gather",
        "note: kernel: screened is now called prefilter",
    ]


@pytest.mark.parametrize("chunks", [[1] * 24, [20, 1, 1, 1, 1], [7, 17], [23, 1]])
@torch.no_grad()
def test_in_chunks_with_a_cache(model: Any, chunks: list[int]) -> None:
    tokens = ids(2, 24)
    whole = model(input_ids=tokens).logits
    cache, found = None, []
    for part in tokens.split(chunks, 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache, found = out.past_key_values, [*found, out.logits]
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_padded_on_either_side(model: Any, left: bool) -> None:
    tokens, lengths = ids(4, 24), (24, 9, 1, 0)  # the last is padding and nothing else
    alone = [model(input_ids=tokens[i : i + 1, :n]).logits[0] for i, n in enumerate(lengths) if n]
    batch, mask = torch.zeros(4, 24, dtype=torch.long), torch.zeros(4, 24, dtype=torch.long)
    for i, n in enumerate(lengths):
        here = slice(24 - n, 24) if left else slice(0, n)
        batch[i, here], mask[i, here] = tokens[i, :n], 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=batch, attention_mask=mask, position_ids=places).logits
    assert bool(logits.isfinite().all())
    for i, n in enumerate(lengths[:3]):
        here = slice(24 - n, 24) if left else slice(0, n)
        torch.testing.assert_close(logits[i, here], alone[i], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_in_a_mixed_batch(model: Any) -> None:
    tokens = ids(6, 12)
    whole = model(input_ids=tokens).logits
    for i in range(6):
        alone = model(input_ids=tokens[i : i + 1]).logits
        torch.testing.assert_close(alone[0], whole[i], atol=1e-4, rtol=1e-4)


def test_nobody_is_warned_of_a_kernel() -> None:
    program = (
        "import torch; from experthub.routing.kernels.sampled import multiply_sampled; "
        "multiply_sampled(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, 1, dtype=torch.long))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
