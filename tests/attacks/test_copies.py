"""Copies, pickles, casts and saves of a routed model are right, or refused with one clear error."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_router import TASKS, make_recipe, some_ids
from experthub import hub
from experthub.hub.errors import UsageError
from experthub.merge import Strategy
from experthub.routing import routers
from torch import Tensor

pytestmark = pytest.mark.attack

EVERY = [pytest.param(strategy, id=name) for name, strategy in routers.items()]
ids = some_ids(2, 12)
BATCH = {"input_ids": ids, "attention_mask": (ids.cumsum(1) > 40).long()}


@pytest.fixture(params=EVERY)
def composition(
    request: Any, base_folder: Path, expert_folder: Callable[..., Path], tmp_path: Path
) -> Any:
    """Two tiny experts with one of the routers."""
    strategy: Strategy[Any] = request.param
    return hub.compose(make_recipe(strategy, base_folder, expert_folder, tmp_path))


def read(composition: Any, model: Any = None) -> Tensor:
    """The logits of a batch with padding, and of one more token with the cache."""
    model = composition.model if model is None else model
    with torch.no_grad(), composition.tasks(TASKS):
        out = model(**BATCH, use_cache=True)
        more = model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    logits: Tensor = torch.cat([out.logits, more.logits], 1)
    return logits


def save_and_load(value: Any) -> Any:
    """Save a value with torch, and load it again."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.sampled(5)
def test_a_copy_is_equal_and_independent(composition: Any) -> None:
    alone = read(composition)
    found = copy.deepcopy(composition.model)
    assert torch.equal(read(composition, found), alone)
    assert torch.equal(read(composition, save_and_load(composition.model)), alone)
    whole = copy.deepcopy(composition)
    again = pickle.loads(pickle.dumps(composition))
    assert torch.equal(read(whole), alone) and torch.equal(read(again), alone)
    base = read(composition, composition.detach())
    assert not torch.equal(base, alone)
    assert torch.equal(read(composition, found), alone)
    assert torch.equal(read(whole), alone)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert torch.equal(read(whole, whole.detach()), base)
    assert torch.equal(read(again), alone)


@pytest.mark.sampled(5)
def test_a_cache_goes_on_in_a_copy(composition: Any) -> None:
    found = pickle.loads(pickle.dumps(composition.model))
    with torch.no_grad(), composition.tasks(TASKS):
        out = composition.model(**BATCH, use_cache=True)
        cache = copy.deepcopy(out.past_key_values)
        here = composition.model(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits
        there = found(input_ids=ids[:, :1], past_key_values=cache).logits
    assert torch.equal(here, there)


@pytest.mark.sampled(5)
def test_a_copy_made_inside_a_forward_pass(composition: Any) -> None:
    alone, made = read(composition), []

    def duplicate(*_: Any) -> None:
        if not made:
            made.append(None)
            made[0] = copy.deepcopy(composition.model)

    handle = composition.model.model.layers[0].self_attn.q_proj.register_forward_hook(duplicate)
    assert torch.equal(read(composition), alone)
    handle.remove()
    assert torch.equal(read(composition, made[0]), alone)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_is_the_same_within_rounding(composition: Any, dtype: torch.dtype) -> None:
    exact = read(composition)
    base = copy.deepcopy(composition)
    plain = read(base, base.detach())
    found = read(composition, composition.model.to(dtype))
    assert found.dtype == dtype
    cast_base = read(base, base.model.to(dtype))
    size = exact.std()
    # The base alone shows what rounding of this dtype does.
    rounding = max(float((cast_base.float() - plain).abs().max() / size), 1e-5)
    difference = (found.float() - exact).abs() / size
    assert float(difference.median()) < 4 * rounding
    back = read(composition, composition.model.to(torch.float32))
    if dtype == torch.float64:
        torch.testing.assert_close(back, exact, atol=1e-5, rtol=1e-5)
    assert bool(back.isfinite().all())


@pytest.mark.parametrize("composition", [routers["smear"], routers["task"]], indirect=True)
def test_a_cast_that_replaces_parameters(composition: Any) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        found = read(composition, composition.model.to(torch.bfloat16))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())


@pytest.mark.sampled(5)
def test_nothing_saves_the_base_in_place_of_a_routed_model(
    composition: Any, tmp_path: Path
) -> None:
    if composition.merged is not None:  # The skills of one task are folded into the weights.
        pytest.skip("the weights are those of the model")
    model = composition.model
    for one in (model, model.base_model, copy.deepcopy(model)):
        for save in (one.save_pretrained, one.push_to_hub):
            with pytest.raises(UsageError, match="cannot be saved as one set of weights"):
                save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.warns(UserWarning, match="holds the weights of the base alone"):
        state = model.state_dict()
    alone = read(composition)
    model.load_state_dict(state)
    assert torch.equal(read(composition), alone)
    composition.detach().save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()


SPAWN = """
import sys, torch
import torch.multiprocessing as mp

def run(composition, ids, tasks, results):
    with torch.no_grad(), composition.tasks(tasks):
        results.put(composition.model(input_ids=ids).logits.numpy())

if __name__ == "__main__":
    import pickle
    from pathlib import Path
    composition, ids, tasks = pickle.loads(Path(sys.argv[1]).read_bytes())
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=run, args=(composition, ids, tasks, results))
    process.start()
    found = torch.from_numpy(results.get(timeout=100))
    process.join()
    with torch.no_grad(), composition.tasks(tasks):
        print(torch.equal(found, composition.model(input_ids=ids).logits))
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("composition", [routers["retrieval"], routers["task"]], indirect=True)
def test_a_spawned_process_gets_the_same(composition: Any, tmp_path: Path) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)
    (tmp_path / "made.pickle").write_bytes(pickle.dumps((composition, ids, TASKS)))
    command = [sys.executable, str(tmp_path / "spawn.py"), str(tmp_path / "made.pickle")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip() == "True", ran.stderr
