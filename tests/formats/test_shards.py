"""Task vectors in several files: the same as in one, wherever they go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.patterns import matches_any
from experthub.hub.formats.task_vector import SHARD, SHARD_INDEX, TASK_VECTOR
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.file_patterns import list_file_patterns
from experthub.hub.registry.registry import Registry
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from safetensors.torch import load_file, save_file
from test_difference import NORM, composed, outputs, tuned_from
from test_push import push, server  # noqa: F401

LIMIT = 20_000  # bytes: the tiny base's matrices have 4 to 33 kB


@pytest.fixture
def tuned(tmp_path: Path, base_folder: Path) -> Path:
    return tuned_from(base_folder, tmp_path / "tuned")


def files_of(name: str) -> set[str]:
    expert = Registry.read().find_expert(Reference.parse(name))
    return set(Store().read_identity(expert.digest).files)


def sharded(folder: Path) -> Path:
    """A task vector of two tensors, each in a file of its own."""
    folder.mkdir(exist_ok=True)
    query = "model.layers.0.self_attn.q_proj.weight"
    tensors = {NORM: torch.ones(32), query: torch.ones(32, 32)}
    places = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        places[name] = SHARD.format(i + 1, 2)
        save_file({name: tensor}, folder / places[name])
    write_index(folder, places)
    return folder


def write_index(folder: Path, places: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / SHARD_INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("form", [{}, {"sparse": 0.2}, {"dtype": "bfloat16"}])
def test_several_files_hold_what_one_holds(
    form: dict[str, Any], base_folder: Path, tuned: Path
) -> None:
    one = hub.diff(str(base_folder), str(tuned), "one", **form)
    many = hub.diff(str(base_folder), str(tuned), "many", max_shard_size=LIMIT, **form)
    shards = sorted(n for n in files_of("many") if n != SHARD_INDEX)
    assert shards == [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    assert len(shards) > 1 and SHARD_INDEX in files_of("many")
    assert files_of("one") == {TASK_VECTOR}
    same = {k: v for k, v in one.figures.items() if k != "bytes"}
    assert same == {k: v for k, v in many.figures.items() if k != "bytes"}
    assert one.expert.training["dtype"] == many.expert.training["dtype"]
    assert torch.equal(
        outputs(composed(base_folder, "one")), outputs(composed(base_folder, "many"))
    )


def test_a_file_has_no_more_than_its_limit(tmp_path: Path, base_folder: Path, tuned: Path) -> None:
    """But for a tensor that alone has more; and transformers' index, entry by entry."""
    hub.diff(str(base_folder), str(tuned), "many", max_shard_size=LIMIT)
    expert = Registry.read().find_expert(Reference.parse("many"))
    Store().copy_out(expert.digest, tmp_path / "out")
    index = json.loads((tmp_path / "out" / SHARD_INDEX).read_text())
    size = 0
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / "out" / file)
        assert {n for n, place in index["weight_map"].items() if place == file} == set(tensors)
        bytes_here = sum(t.nbytes for t in tensors.values())
        assert bytes_here <= LIMIT or len(tensors) == 1
        size += bytes_here
    assert index["metadata"]["total_size"] == size


def test_it_travels(tmp_path: Path, base_folder: Path, tuned: Path, server: Any) -> None:  # noqa: F811
    """A model hub, a shared folder and an archive carry it under one digest."""
    made = hub.diff(str(base_folder), str(tuned), "many", max_shard_size=LIMIT)
    for place in ("hf:alice/many", f"file:{tmp_path / 'shared'}"):
        code, _, err = push("many", place)
        assert code == 0, err
        ran = run_hub("pull", place, "--name", f"back-{place[:2]}", "--json")
        assert ran.code == 0, ran.err
        back = Registry.read().find_expert(Reference.parse(f"back-{place[:2]}"))
        assert back.digest == made.expert.digest
    assert run_hub("export", "many", tmp_path / "many.tar").code == 0
    shutil.rmtree(Store().root / "objects")
    assert run_hub("import", tmp_path / "many.tar").code == 0
    assert run_hub("verify").code == 0
    composed(base_folder, "many")


def without_a_file(folder: Path) -> None:
    (folder / SHARD.format(2, 2)).unlink()


def with_another_tensor(folder: Path) -> None:
    path = folder / SHARD.format(2, 2)
    save_file(load_file(path) | {"extra": torch.ones(2)}, path)


def with_one_missing(folder: Path) -> None:
    path = folder / SHARD.format(2, 2)
    save_file({"other": torch.ones(2)}, path)


def named(places: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, places)


def with_both(folder: Path) -> None:
    save_file({NORM: torch.ones(32)}, folder / TASK_VECTOR)


def with_nan(folder: Path) -> None:
    save_file({NORM: torch.full((32,), torch.nan)}, folder / SHARD.format(1, 2))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (without_a_file, "00002-of-00002.safetensors is not a file"),
        (with_another_tensor, "it has 'extra' in no file, but the tensor is in task_vector-00002"),
        (
            with_one_missing,
            "in task_vector-00002-of-00002.safetensors, but the tensor is in no file",
        ),
        (with_both, "stands beside it"),
        (with_nan, "NaN"),
        (named({}), "weight_map"),
        (named(["a"]), "weight_map"),
        (named({NORM: "../../secret.safetensors"}), "names \\['../../secret"),
        (named({NORM: 7}), "names"),
        (named({NORM: SHARD.format(1, 3)}), "names"),
        (named({NORM: ["a"]}), "names"),
        (named({NORM: SHARD.format(1, 1), "more": None}), "names"),
    ],
)
def test_an_index_that_is_not_the_files_is_refused(
    change: Callable[[Path], None], error: str, tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "vector")
    assert read_folder(folder).kind == "task_vector"
    change(folder)
    with pytest.raises(IntegrityError, match=error):
        read_folder(folder)


def test_a_parameter_in_two_files_is_refused(tmp_path: Path) -> None:
    """Dense in one and sparse in the other: the index alone does not show it."""
    folder = sharded(tmp_path / "vector")
    sparse = {f"{NORM}.mask": torch.zeros(4, dtype=torch.uint8), f"{NORM}.values": torch.ones(0)}
    shapes = {"hub.shapes": json.dumps({NORM: [32]})}
    save_file(sparse, folder / SHARD.format(2, 2), metadata=shapes)
    second = dict.fromkeys(sparse, SHARD.format(2, 2))
    write_index(folder, {NORM: SHARD.format(1, 2)} | second)
    with pytest.raises(IntegrityError, match=r"and task_vector-00001-of-.* has it, too"):
        read_folder(folder)


def test_a_limit_is_a_size(base_folder: Path, tuned: Path) -> None:
    words = ("diff", base_folder, tuned, "--name", "x", "--max-shard-size")
    assert run_hub(*words, "much").code == 2
    assert run_hub(*words, "0").code == 2
    with pytest.raises(NotFoundError):
        Registry.read().find_expert(Reference.parse("x"))


@pytest.mark.parametrize(
    "name", ["task_vector-1-of-2.safetensors", "task_vector-/../x-of-00001.safetensors"]
)
def test_no_other_name_is_a_shard(name: str) -> None:
    assert matches_any(SHARD.format(3, 12), list_file_patterns()) and not matches_any(
        name, list_file_patterns()
    )
