"""Adapters in the formats of other programs, against their formulas."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.bases.gguf import convert_gguf
from experthub.hub.conversion.found_adapter import find_adapter
from experthub.hub.errors import HubError, IntegrityError, NotFoundError
from peft_kinds import load, make_adapter, make_base, read_deltas
from safetensors.torch import load_file, save_file
from tiny_gguf import read_changes, write_gguf, write_gguf_lora
from wild_adapters import write_diffusers, write_kohya, write_mlx, write_peft

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logging.disable(logging.WARNING)
    yield make_base("llama", tmp_path_factory.mktemp("base") / "m")
    logging.disable(logging.NOTSET)


def far(got: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    assert got.keys() == right.keys()
    largest = max(float(t.abs().max()) for t in right.values())
    return max(float((got[n] - t).abs().max()) for n, t in right.items()) / largest


RENAMED = {
    "adapter_name": lambda n: n.replace(".weight", ".default.weight"),
    "other_name": lambda n: n.replace(".weight", ".sft_v2.weight"),
    "no_prefix": lambda n: n.removeprefix("base_model.model."),
    "parallel": lambda n: f"module.{n}",
    "compiled": lambda n: n.replace("base_model.model.", "_orig_mod.base_model.model."),
    "compiled_inside": lambda n: n.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda n: n.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "checkpointed": lambda n: n.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "deepspeed": lambda n: f"_forward_module.{n}",
    "all_of_them": lambda n: f"module._orig_mod.{n}".replace(".weight", ".x.weight"),
}


@pytest.mark.parametrize("form", RENAMED)
def test_names_of_wrappers_are_brought_into_order(form: str, llama: Path, tmp_path: Path) -> None:
    folder = write_peft(llama, tmp_path / "a")
    right = read_deltas(folder)
    before = load_file(folder / ADAPTER)
    save_file({RENAMED[form](n): t for n, t in before.items()}, folder / ADAPTER)
    assert not find_adapter(folder).is_native
    made = hub.convert(folder, tmp_path / "out")
    assert made.kind == "lora" and far(read_deltas(tmp_path / "out"), right) == 0
    after = load_file(tmp_path / "out" / ADAPTER)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_one_of_several_adapters_in_a_file_is_chosen(llama: Path, tmp_path: Path) -> None:
    one, two = (write_peft(llama, tmp_path / name, i) for i, name in enumerate("ab"))
    both = {}
    for folder, name in ((one, "red"), (two, "blue")):
        tensors = load_file(folder / ADAPTER).items()
        both |= {n.replace(".weight", f".{name}.weight"): t for n, t in tensors}
    right = read_deltas(two)
    save_file(both, one / ADAPTER)
    with pytest.raises(HubError, match="holds 2 adapters: blue, red"):
        hub.convert(one, tmp_path / "out")
    hub.convert(one, tmp_path / "out", adapter="blue")
    assert far(read_deltas(tmp_path / "out"), right) == 0


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx(kind: str, llama: Path, tmp_path: Path) -> None:
    """`y += scale (x a) b`; DoRA: `m / norm (W + scale b^T a^T)`."""
    folder = write_mlx(llama, tmp_path / "a", 0, kind)
    tensors = {k: v.double() for k, v in load_file(folder / "adapters.safetensors").items()}
    weights, right = {k: v.double() for k, v in load(llama).state_dict().items()}, {}
    for name in (n.removesuffix(".lora_a") for n in tensors if n.endswith("lora_a")):
        change = 20 * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
        weight = weights[f"{name}.weight"]
        if kind == "dora":
            moved = weight + change
            change = tensors[f"{name}.m"][:, None] / moved.norm(dim=1)[:, None] * moved - weight
        right[f"{name}.weight"] = change
    hub.convert(folder, tmp_path / "out")
    assert far(read_deltas(tmp_path / "out"), right) < 1e-6


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16}}, "the scale was 80 then"),
        ({"lora_parameters": {"rank": 2}}, "has no scale"),
        ({"fine_tune_type": "full"}, "a full fine-tune"),
    ],
)
def test_mlx_refused(change: dict[str, Any], error: str, llama: Path, tmp_path: Path) -> None:
    folder = write_mlx(llama, tmp_path / "a", 0)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(IntegrityError, match=error) as caught:
        hub.convert(folder, tmp_path / "out")
    assert caught.value.hint and not (tmp_path / "out").exists()


def test_metadata_that_are_null_are_none(llama: Path, tmp_path: Path) -> None:
    """Read a header as mlx writes it."""
    folder = write_mlx(llama, tmp_path / "a", 0)
    path = folder / "adapters.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert hub.convert(folder, tmp_path / "out").kind == "lora"


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_kohya(kind: str, llama: Path, tmp_path: Path) -> None:
    """Names with underscores, and an alpha for each module."""
    folder = write_kohya(tmp_path / "a", "lora_te_model_layers_1_mlp_down_proj")
    name = "lora_te_model_layers_1_mlp_down_proj"
    torch.manual_seed(0)
    if kind == "lora":
        down, up = torch.randn(3, 48), torch.randn(32, 3)
        tensors = {"lora_down.weight": down, "lora_up.weight": up}
        right = up.double() @ down.double()
    elif kind == "loha":
        b1, a1, b2, a2 = (torch.randn(s) for s in ((32, 3), (3, 48), (32, 3), (3, 48)))
        tensors = {"hada_w1_a": b1, "hada_w1_b": a1, "hada_w2_a": b2, "hada_w2_b": a2}
        right = (b1.double() @ a1.double()) * (b2.double() @ a2.double())
    else:
        w1, b, a = torch.randn(4, 6), torch.randn(8, 3), torch.randn(3, 8)
        tensors = {"lokr_w1": w1, "lokr_w2_a": b, "lokr_w2_b": a}
        right = torch.kron(w1.double(), b.double() @ a.double())
    named = {f"{name}.{k}": v for k, v in tensors.items()} | {f"{name}.alpha": torch.tensor(2.0)}
    save_file(named, folder / "lora.safetensors", metadata={"ss_base_model_version": "x"})
    hub.convert(folder, tmp_path / "out", base=str(llama))
    got = read_deltas(tmp_path / "out")
    assert far(got, {"model.layers.1.mlp.down_proj.weight": right * 2 / 3}) < 1e-6


def test_image_generators_are_refused_truly(llama: Path, tmp_path: Path) -> None:
    write_diffusers(tmp_path / "a")
    with pytest.raises(IntegrityError, match="adapts the unet of an image generator"):
        hub.convert(tmp_path / "a", tmp_path / "out")
    write_kohya(tmp_path / "b", "lora_unet_down_blocks_0_attn_q")
    with pytest.raises(IntegrityError, match="no module of"):
        hub.convert(tmp_path / "b", tmp_path / "out", base=str(llama))


@pytest.mark.parametrize("form", ["peft", "lora.down", "lora_linear_layer"])
def test_the_text_encoder_of_diffusers(form: str, tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "a", "text_encoder.text_model.layers.0")
    path = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    a, b = (t.double() for n, t in sorted(tensors.items()))
    down, up = {
        "peft": ("lora_A", "lora_B"),
        "lora.down": ("lora.down", "lora.up"),
        "lora_linear_layer": ("lora_linear_layer.down", "lora_linear_layer.up"),
    }[form]
    renamed = {n.replace("lora_A", down).replace("lora_B", up): t for n, t in tensors.items()}
    save_file(renamed, path)
    hub.convert(folder, tmp_path / "out")
    got = read_deltas(tmp_path / "out")
    assert far(got, {"text_model.layers.0.q_proj.weight": b @ a}) < 1e-6


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_gguf(kv_heads: int, tmp_path: Path) -> None:
    """The same as adding the LoRA to the GGUF model, whose rows of q and k are reordered."""
    write_gguf(tmp_path / "plain.gguf", kv_heads)
    lora = write_gguf_lora(tmp_path / "lora.gguf", kv_heads)
    write_gguf(tmp_path / "merged.gguf", kv_heads, read_changes(lora))
    for name in ("plain", "merged"):
        (tmp_path / name).mkdir()
        convert_gguf(tmp_path / f"{name}.gguf", tmp_path / name)
    before, after = (load(tmp_path / name).state_dict() for name in ("plain", "merged"))
    made = hub.convert(lora, tmp_path / "out", base=str(tmp_path / "plain"))
    got = read_deltas(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before[n], after[n])} - {"lm_head.weight"}
    assert made.kind == "lora" and set(got) == changed and len(changed) == 4
    for name, change in got.items():
        right = (after[name] - before[name]).double()
        assert float((change - right).abs().max()) < 1e-5 * float(right.abs().max())


def test_gguf_lora_of_a_gguf_base(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", 2)
    lora = write_gguf_lora(tmp_path / "lora.gguf", 2)
    for name, stated in (("a", str(base)), ("b", f"file:{base}")):
        assert hub.convert(lora, tmp_path / name, base=stated).kind == "lora"
    merged = write_gguf(tmp_path / "merged.gguf", 2, read_changes(lora))
    (tmp_path / "merged").mkdir()
    convert_gguf(merged, tmp_path / "merged")
    recipe = {"base": str(base), "merge": {"method": "linear"}}
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        right = load(tmp_path / "merged")(input_ids=ids).logits
        got = hub.compose({**recipe, "experts": [str(tmp_path / "a")]}).model(input_ids=ids).logits
    assert float((got - right).abs().max()) < 1e-5 * float(right.abs().max())
    with pytest.raises(HubError, match="names no base") as caught:
        hub.compose({**recipe, "experts": [str(lora)]})
    assert f"hub convert {lora} OUT --base BASE" in caught.value.hint
    added = run_hub("add", lora, "--name", "added", "--base", base)
    assert added.code == 0, added.err
    assert hub.compose({**recipe, "experts": ["added"]}).plan.members


def test_gguf_of_unknown_order_is_refused(tmp_path: Path) -> None:
    lora = write_gguf_lora(tmp_path / "lora.gguf", 2)
    lora.write_bytes(
        lora.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0jamba")
    )
    with pytest.raises(IntegrityError, match="does not know how 'jamba' orders its weights"):
        hub.convert(lora, tmp_path / "out")
    model = write_gguf(tmp_path / "model.gguf")
    with pytest.raises(IntegrityError, match="is no adapter"):
        hub.convert(model, tmp_path / "out")


def test_adapters_in_sub_folders_are_listed_and_chosen(llama: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("red", "blue")):
        write_peft(llama, tmp_path / "run" / name, number)
    with pytest.raises(HubError, match="holds 2 adapters: blue, red") as caught:
        hub.convert(tmp_path / "run", tmp_path / "out")
    assert "--subfolder" in caught.value.hint
    hub.convert(tmp_path / "run", tmp_path / "out", subfolder="blue")
    assert far(read_deltas(tmp_path / "out"), read_deltas(tmp_path / "run" / "blue")) == 0
    for wrong in ("green", "../run", "/tmp"):
        with pytest.raises(NotFoundError, match="has no adapter in"):
            hub.convert(tmp_path / "run", tmp_path / "other", subfolder=wrong)


def test_the_only_adapter_below_a_folder_is_found(llama: Path, tmp_path: Path) -> None:
    write_peft(llama, tmp_path / "run" / "final")
    write_peft(llama, tmp_path / "run" / "checkpoint-100")
    made = hub.convert(tmp_path / "run", tmp_path / "out")
    assert made.kind == "lora"
    assert far(read_deltas(made.folder), read_deltas(tmp_path / "run" / "final")) == 0


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "trained tokens before the input"),
        ({"peft_type": "CARTRIDGE"}, "trained keys and values"),
        ({"peft_type": "XLORA"}, "routes between other adapters"),
        ({"peft_type": "NEW_THING"}, "which the hub cannot convert"),
        ({"peft_type": "LOHA", "future": 3}, "unknown key 'future' of LOHA"),
        ({"use_dora": True, "use_qalora": True}, "QALoRA pools"),
        ({"use_dora": True, "alora_invocation_tokens": [1]}, "only after these tokens"),
    ],
)
def test_what_is_no_change_of_weights_is_refused_truly(
    config: dict[str, Any], error: str, llama: Path, tmp_path: Path
) -> None:
    folder = write_peft(llama, tmp_path / "a", **config)
    if config.get("peft_type") == "LOHA":
        own = {"peft_type": "LOHA", "r": 2, "alpha": 4, "future": 3}
        (folder / CONFIG).write_text(json.dumps(own))
    with pytest.raises(IntegrityError, match=error) as caught:
        hub.convert(folder, tmp_path / "out")
    assert caught.value.hint and not (tmp_path / "out").exists()


def test_a_base_that_is_missing_or_another_is_named(llama: Path, tmp_path: Path) -> None:
    make_adapter("DoRA", llama, tmp_path / "a", "llama")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for named, error in ((None, "names no base"), ("org/nowhere", "which no registry knows")):
        changed = config | {"base_model_name_or_path": named}
        (tmp_path / "a" / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(HubError, match=error) as caught:
            hub.convert(tmp_path / "a", tmp_path / "out")
        assert "--base BASE" in caught.value.hint
    other = make_base("gpt2", tmp_path / "other")
    with pytest.raises(HubError, match=r"which .* does not have"):
        hub.convert(tmp_path / "a", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_is_named(llama: Path, tmp_path: Path) -> None:
    make_adapter("LoHa", llama, tmp_path / "a", "llama")
    tensors = load_file(tmp_path / "a" / ADAPTER)
    tensors.pop(next(n for n in tensors if n.endswith("hada_w2_b")))
    save_file(tensors, tmp_path / "a" / ADAPTER)
    with pytest.raises(IntegrityError, match="has no tensor hada_w2_b"):
        hub.convert(tmp_path / "a", tmp_path / "out")
