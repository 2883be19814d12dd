"""Experts out of full fine-tunes: exact where they are dense, stated where they are smaller."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import Ran, logits, run_hub, tiny_bert, tiny_llama
from experthub import hub
from experthub.hub.bases import base as bases
from experthub.hub.bases.loading import load_model
from experthub.hub.errors import ConflictError, HubError, IntegrityError, UsageError
from experthub.hub.finetunes.form import Form
from experthub.hub.formats.safetensors_header import read_header
from experthub.hub.formats.task_vector import SHAPES, read_task_vector
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.registry import Registry
from experthub.merge import Dense, LowRank, truncate
from safetensors.torch import load_file, save_file
from test_push import push, server  # noqa: F401

VECTOR = "task_vector.safetensors"
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2, whose linears are stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tuned_from(base: Path, folder: Path, keep: tuple[str, ...] = (), low: int = 0) -> Path:
    """A base with every parameter changed a little but for those whose names contain a word.

    low: the rank of the change of matrices, full by default.
    """
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(7)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if low and tensor.ndim == 2:
            left = torch.randn(tensor.shape[0], low, generator=generator)
            return tensor + 0.02 * left @ torch.randn(low, tensor.shape[1], generator=generator)
        return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)

    state = load_file(base / "model.safetensors")
    for name in state:
        if not any(word in name for word in keep):
            state[name] = change(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def tuned(tmp_path: Path, base_folder: Path) -> Path:
    return tuned_from(base_folder, tmp_path / "tuned")


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A model folder with its tensors changed in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def composed(base: Path, *experts: Any, scale: float = 1.0) -> Any:
    merge = {"method": "task_arithmetic", "scale": scale}
    return hub.compose({"base": str(base), "experts": list(experts), "merge": merge}).model


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([[5, 77, 130, 9, 20, 33, 41]])
        return torch.Tensor(model(input_ids=ids)[0])


def loaded(folder: Path) -> Any:
    return load_model(bases.read(folder, str(folder)), "float32", None)


def stored(name: str, file: str = VECTOR) -> Path:
    digest = Registry.read().find_expert(Reference.parse(name)).digest
    return hub.Store().verify_file(digest, file)


def true_difference(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    before, after = (load_file(f / "model.safetensors") for f in (base, tuned))
    return {n: after[n] - before[n] for n in before}


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
def test_base_plus_the_difference_is_the_finetuned_model(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    """Embeddings, norms and biases too; tied weights are stored once, and stay tied."""
    base = make(tmp_path / "base")
    tuned = tuned_from(base, tmp_path / "tuned", keep=("norm", "ln_", "LayerNorm"))
    made = hub.diff(str(base), str(tuned), "full")
    assert made.figures["largest_deviation"] < 1e-6 and made.figures["relative_error"] == 0
    assert made.expert.kind == "task_vector" and made.figures["unchanged"] > 0
    changed = load_file(stored("full"))
    assert not any("norm" in name.lower() or "ln_" in name for name in changed)
    assert made.figures["dense_bytes"] == sum(4 * t.numel() for t in changed.values())
    model, expected = composed(base, "full"), loaded(tuned)
    torch.testing.assert_close(outputs(model), outputs(expected), atol=1e-5, rtol=1e-4)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]


def test_a_negative_weight_takes_a_difference_back(base_folder: Path, tuned: Path) -> None:
    """base + tau - tau = base; and base - tau is as far on the other side."""
    hub.diff(str(base_folder), str(tuned), "mine")
    back = composed(base_folder, "mine", {"expert": "mine", "weight": -1.0, "as": "less"})
    base = loaded(base_folder)
    assert torch.equal(outputs(back), outputs(base))
    less = composed(base_folder, {"expert": "mine", "weight": -1.0})
    true = true_difference(base_folder, tuned)
    for name, change in true.items():
        expected = base.get_parameter(name) - change
        torch.testing.assert_close(less.get_parameter(name), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(outputs(less), outputs(composed(base_folder, "mine", scale=-1.0)))


def test_it_is_registered_like_what_is_trained(base_folder: Path, tuned: Path, home: Path) -> None:
    ran = run_hub(
        *("diff", base_folder, tuned, "--name", "mine", "--task", "mine:letters"),
        *("--description", "Letters", "--version", "3", "--json"),
    )
    assert ran.code == 0, ran.err
    expert = Registry.read().find_expert(Reference.parse("mine"))
    assert (expert.version, expert.task, expert.description) == (3, "mine:letters", "Letters")
    identity = hub.Store().read_identity(expert.digest)
    assert identity.base_fingerprint == bases.read(base_folder, "x").fingerprint
    training = expert.training
    assert (training["method"], training["finetuned"]) == ("diff", "tuned")
    assert str(home.parent) not in json.dumps(training)
    assert ran.json["expert"]["training"] == training and ran.json["schema"] == 1
    assert b"hub.base_digest" in stored("mine").read_bytes()[:4096]
    assert hub.diff(str(base_folder), str(tuned), "mine").expert.version == 3, "the same content"
    with pytest.raises(ConflictError):
        hub.diff(str(base_folder), str(tuned), "mine", sparse=0.5, version=3)
    table = run_hub("diff", base_folder, tuned, "--name", "low", "--rank", "2")
    assert "left out" in table.out and "relative error" in table.out and "comparing" in table.err
    assert run_hub("verify").code == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_state_their_rounding(dtype: str, base_folder: Path, tuned: Path) -> None:
    figures = hub.diff(str(base_folder), str(tuned), "mine", dtype=dtype).figures
    held, true = load_file(stored("mine")), true_difference(base_folder, tuned)
    assert {t.dtype for t in held.values()} == {getattr(torch, dtype)}
    missed = sum(float((held[n].double() - d.double()).square().sum()) for n, d in true.items())
    total = sum(float(d.double().square().sum()) for d in true.values())
    assert figures["relative_error"] == pytest.approx((missed / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.8}, {"rank": 1000}])
def test_an_extracted_lora_is_the_best_one_and_pefts(
    make: Callable[..., Path], options: dict[str, Any], tmp_path: Path
) -> None:
    """Against a literal SVD of every linear, and against peft's own logits."""
    from peft import PeftModel

    base = make(tmp_path / "base")
    tuned = tuned_from(base, tmp_path / "tuned")
    made = hub.diff(str(base), str(tuned), "low", **options)
    conv, true = make is tiny_gpt2, true_difference(base, tuned)
    held = load_file(stored("low", "adapter_model.safetensors"))
    missed = total = 0.0
    for name, change in true.items():
        total += float(change.double().square().sum())
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in held:
            assert name in made.left_out
            missed += float(change.double().square().sum())
            continue
        product = (
            held[f"{module}.lora_B.weight"].double() @ held[f"{module}.lora_A.weight"].double()
        )
        s = torch.linalg.svdvals(change.double())
        rank = held[f"{module}.lora_A.weight"].shape[0]
        if "energy" in options:
            shares = s.square().cumsum(0) / s.square().sum()
            assert shares[rank - 1] >= 0.8 and (rank == 1 or shares[rank - 2] < 0.8)
        else:
            assert rank == min(options["rank"], len(s))
        rest = float(((product.T if conv else product) - change.double()).square().sum())
        assert rest == pytest.approx(float(s[rank:].square().sum()), rel=1e-4, abs=1e-9)
        missed += rest
    assert made.figures["relative_error"] == pytest.approx((missed / total) ** 0.5, rel=1e-3)
    assert made.figures["left_out"]["parameters"] == len(made.left_out) > 0
    ours = outputs(composed(base, "low"))
    source = Path(made.expert.sources[0].removeprefix("file:"))
    adapted = PeftModel.from_pretrained(loaded(base), source).eval()
    torch.testing.assert_close(ours, outputs(adapted), atol=2e-5, rtol=1e-4)


def test_a_low_rank_change_is_extracted_whole(tmp_path: Path, base_folder: Path) -> None:
    keep = ("norm", "embed")
    tuned = tuned_from(base_folder, tmp_path / "tuned", keep=keep, low=2)
    made = hub.diff(str(base_folder), str(tuned), "low", energy=0.9999)
    assert made.figures["ranks"] == {"min": 2, "mean": 2.0, "max": 2}
    assert made.figures["relative_error"] < 1e-4 and not made.left_out
    config = json.loads(stored("low", "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    torch.testing.assert_close(
        outputs(composed(base_folder, "low")), outputs(loaded(tuned)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_a_sparse_vector_holds_the_largest_entries(
    share: float, base_folder: Path, tuned: Path
) -> None:
    made = hub.diff(str(base_folder), str(tuned), "few", sparse=share)
    file = stored("few")
    held, form = load_file(file), read_task_vector({VECTOR: file})
    true = true_difference(base_folder, tuned)
    assert set(form) == set(true)
    model, base = composed(base_folder, "few"), loaded(base_folder)
    for name, change in true.items():
        expected = change.clone()
        if form[name].mask is not None:
            kept = int(numpy.ceil(share * change.numel()))
            smallest = change.abs().flatten().sort(descending=True).values[kept - 1]
            expected[change.abs() < smallest] = 0
            bits = numpy.unpackbits(held[f"{name}.mask"].numpy(), bitorder="little")
            assert bits.sum() == kept == len(held[f"{name}.values"])
            assert (bits[: change.numel()] == (expected != 0).flatten().numpy()).all()
        torch.testing.assert_close(
            model.get_parameter(name), base.get_parameter(name) + expected, atol=1e-6, rtol=1e-6
        )
    assert any(s.mask for s in form.values()) == (share < 1)
    assert made.figures["bytes"] < (1.1 if share == 1 else share * 1.2 + 0.15) * 4 * sum(
        t.numel() for t in true.values()
    )
    assert (made.figures["relative_error"] == 0) == (share == 1)


def test_what_did_not_change_takes_no_place_in_a_sparse_vector(
    tmp_path: Path, base_folder: Path
) -> None:
    """Fewer entries changed than the share allows: only those are stored."""
    tuned = shutil.copytree(base_folder, tmp_path / "tuned")

    def two_entries(state: dict[str, torch.Tensor]) -> None:
        state[QUERY][3, 1] += 0.5
        state[QUERY][31, 31] -= 0.25

    edited(tuned, two_entries)
    made = hub.diff(str(base_folder), str(tuned), "two", sparse=0.5)
    assert load_file(stored("two"))[f"{QUERY}.values"].tolist() == pytest.approx([0.5, -0.25])
    assert made.figures["relative_error"] == 0 and made.figures["changed"] == 1


def test_untying_the_output_is_a_change_of_its_own(tmp_path: Path, base_folder: Path) -> None:
    """An output layer that stays as it was, beside changed input embeddings that it was tied to."""
    tuned = shutil.copytree(base_folder, tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    def untie(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.embed_tokens.weight"] *= 1.5

    edited(tuned, untie)
    hub.diff(str(base_folder), str(tuned), "untied")
    model = composed(base_folder, "untied")
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), logits(loaded(tuned)), atol=1e-5, rtol=1e-5)


def test_a_tied_change_beside_a_lora_on_the_output(
    tmp_path: Path, base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    """The vector changes both uses of the weight, the LoRA one of them."""
    tuned = tuned_from(base_folder, tmp_path / "tuned")
    hub.diff(str(base_folder), str(tuned), "full")
    head = expert_folder(3, targets=("lm_head",), gates=False)
    model = composed(base_folder, "full", str(head))
    tensors = load_file(head / "adapter_model.safetensors")
    b, a = (tensors[f"base_model.model.lm_head.lora_{x}.weight"] for x in "BA")
    expected = loaded(tuned).get_input_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.lm_head.weight, expected + 2 * b @ a, atol=1e-4, rtol=1e-4)


def broken(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Path]:
    return lambda folder: edited(folder, change)


def resized(state: dict[str, torch.Tensor]) -> None:
    rows = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.cat([rows, rows[:4]])


def renamed(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weights"] = state.pop(NORM)


def infinite(state: dict[str, torch.Tensor]) -> None:
    state[NORM][3] = float("nan")


def only_the_norm(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in load_file(Path("base") / "model.safetensors").items():
        state[name] = tensor + (1 if name == NORM else 0)


def test_the_size_that_was_passed_is_reported() -> None:
    with pytest.raises(UsageError, match="--max-shard-size is -5"):
        Form(max_shard_size=-5)


def diff_words(base: Path, tuned: Path, *more: str) -> Ran:
    return run_hub("diff", base, tuned, "--name", "mine", *more)


@pytest.mark.parametrize(
    ("change", "options", "code", "error", "hint"),
    [
        (resized, (), 1, "[260, 32] in ", "vocabulary"),
        (renamed, (), 3, "lack 1 of the weights", "save the whole model again"),
        (infinite, (), 3, "model.norm.weight of ", "NaN"),
        (only_the_norm, ("--rank", "2"), 1, "no linear module", "--sparse"),
        (only_the_norm, ("--energy", "0.5"), 1, "no linear module", "--sparse"),
        (dict.items, ("--rank", "2", "--sparse", "0.1"), 2, "exclude each other", "only one"),
        (dict.items, ("--rank", "2", "--energy", "0.1"), 2, "exclude each other", "only one"),
        (dict.items, ("--rank", "0"), 2, "--rank is 0", "at least 1"),
        (dict.items, ("--energy", "1.5"), 2, "--energy is 1.5", "above 0"),
        (dict.items, ("--sparse", "0"), 2, "--sparse is 0.0", "above 0"),
        (dict.items, ("--sparse", "nan"), 2, "--sparse is nan", "above 0"),
        (dict.items, ("--dtype", "int8"), 2, "--dtype is 'int8'", "bfloat16"),
    ],
)
def test_what_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any],
    options: tuple[str, ...],
    code: int,
    error: str,
    hint: str,
    base_folder: Path,
    tuned: Path,
    home: Path,
) -> None:
    shutil.copytree(base_folder, "base")
    ran = diff_words(base_folder, edited(tuned, change), *options)
    assert ran.code == code, ran.err
    assert error in ran.lines("error:")[0] and hint in ran.err
    assert not list((home / "registry").glob("*/*")) and not list((home / "objects").rglob("*.*"))


def test_equal_models_and_overflows_are_refused(base_folder: Path, tuned: Path) -> None:
    same = diff_words(base_folder, base_folder)
    assert same.code == 1 and "nothing has changed" in same.err

    def huge(state: dict[str, torch.Tensor]) -> None:
        state[NORM] += 1e6

    ran = diff_words(base_folder, edited(tuned, huge), "--dtype", "float16")
    assert ran.code == 1 and "overflows float16" in ran.err
    assert run_hub("diff", "no-such-base", tuned, "--name", "x").code == 4
    assert run_hub("diff", base_folder, tuned, "--name", "No Name").code == 2


def damaged(file: Path, kind: str) -> None:
    """A sparse task vector of one parameter `[3, 3]`, damaged in one way."""
    mask = torch.tensor([0b00000101, 0b1], dtype=torch.uint8)
    tensors = {"w.mask": mask, "w.values": torch.ones(3)}
    shapes: Any = {"w": [3, 3]}
    if kind == "count":
        tensors["w.values"] = torch.ones(2)
    elif kind == "length":
        tensors["w.mask"] = torch.cat([mask, torch.zeros(1, dtype=torch.uint8)])
    elif kind == "padding":
        tensors["w.mask"] = torch.tensor([0b1, 0b1001], dtype=torch.uint8)
    elif kind == "twice":
        tensors["w"] = torch.ones(3, 3)
    elif kind == "alone":
        del tensors["w.values"]
    elif kind == "integers":
        tensors["v"] = torch.ones(3, dtype=torch.int64)
    elif kind == "values":
        tensors["w.values"] = torch.ones(3, dtype=torch.int32)
    elif kind == "shapes":
        shapes = {}
    elif kind == "extra":
        shapes["v"] = [2]
    elif kind == "text":
        shapes = [3, 3]
    elif kind == "huge":
        shapes = {"w": [3, 1 << 50]}
    elif kind == "nan":
        tensors["w.values"][1] = float("nan")
    save_file(tensors, file, metadata={SHAPES: json.dumps(shapes)})


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("count", "3 bits set for 2 values"),
        ("length", r"w.mask is \[3\]"),
        ("padding", "past its last entry"),
        ("twice", "twice, dense and with a mask"),
        ("alone", "neither a change nor a mask"),
        ("integers", "v is I64"),
        ("values", "w.values is I32"),
        ("shapes", "no shape"),
        ("extra", "which has no mask"),
        ("text", "not a JSON object"),
        ("huge", "entries need"),
        ("nan", "NaN"),
    ],
)
def test_damaged_sparse_vectors_are_not_taken_in(kind: str, error: str, tmp_path: Path) -> None:
    damaged(tmp_path / VECTOR, kind)
    with pytest.raises(IntegrityError, match=error):
        hub.Store().add(tmp_path)
    damaged(tmp_path / VECTOR, "none of these")
    hub.Store().add(tmp_path)


def test_a_sparse_vector_of_another_shape_is_refused(tmp_path: Path, base_folder: Path) -> None:
    mask, values = torch.tensor([3], dtype=torch.uint8), torch.ones(2)
    tensors = {f"{NORM}.mask": mask, f"{NORM}.values": values}
    save_file(tensors, tmp_path / VECTOR, metadata={SHAPES: json.dumps({NORM: [8]})})
    with pytest.raises(HubError, match=r"changes model.norm.weight \[8\], but"):
        composed(base_folder, str(tmp_path))


@pytest.mark.parametrize("options", [(), ("--sparse", "0.1"), ("--energy", "0.5")])
def test_differences_travel(
    options: tuple[str, ...],
    server: Any,  # noqa: F811
    base_folder: Path,
    tuned: Path,
    home: Path,
) -> None:
    """Pushed, forgotten, pulled: the same digest, a store that is whole, the same function."""
    made = diff_words(base_folder, tuned, *options, "--json")
    assert made.code == 0, made.err
    before = outputs(composed(base_folder, "mine"))
    code, _, err = push("mine", "hf:alice/mine")
    assert code == 0, err
    for place in ("objects", "registry", "runs"):
        shutil.rmtree(home / place)
    ran = run_hub("pull", "hf:alice/mine", "--name", "theirs", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["pulled"][0]["digest"] == made.json["expert"]["digest"]
    assert run_hub("verify").code == 0
    assert torch.equal(outputs(composed(base_folder, "theirs")), before)


def test_a_file_is_laid_out_as_torch_maps_it(base_folder: Path, tuned: Path) -> None:
    """Every tensor of floats starts at a multiple of its width, whatever masks are beside it."""
    hub.diff(str(base_folder), str(tuned), "few", sparse=0.07)
    header = read_header(stored("few"))
    assert all(i.begin % 4 == 0 for i in header.values() if i.dtype == "F32")
    assert {i.dtype for i in header.values()} == {"F32", "U8"}


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 1.0])
def test_energy_is_the_share_of_squared_singular_values(
    shape: tuple[int, int], energy: float
) -> None:
    torch.manual_seed(0)
    d = torch.randn(shape, dtype=torch.float64)
    s = torch.linalg.svdvals(d)
    sums = s.square().cumsum(0)
    expected = next(r for r in range(1, len(s) + 1) if sums[r - 1] >= energy * sums[-1])
    assert truncate(Dense(d), energy=energy).rank == expected
    both = LowRank(torch.randn(4, shape[1]).double(), torch.randn(shape[0], 4).double(), 1.5)
    same = truncate(Dense(both.dense()), energy=energy * 0.999)
    assert truncate(both, energy=energy * 0.999).rank == same.rank
    torch.testing.assert_close(truncate(both, energy=energy * 0.999).dense(), same.dense())


def test_energy_has_its_limits() -> None:
    assert truncate(Dense(torch.zeros(3, 4)), energy=0.9).rank == 1
    for options in ({}, {"rank": 1, "energy": 0.5}, {"energy": 0.0}, {"energy": 1.1}):
        with pytest.raises(ValueError, match="expected"):
            truncate(Dense(torch.ones(3, 4)), **options)  # type: ignore[arg-type]
