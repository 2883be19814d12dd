"""An adapter that peft pushes can be pulled, and composes to peft's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits, run_hub
from experthub import hub
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.registry import Registry
from hf_server import HfServer

LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.self_attn.v_proj": 7}},
    "layers": {"layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "whole": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 77]},
    "activated": {"alora_invocation_tokens": [77, 130]},
}
PUSH = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
base, folder, loras = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, options in loras.items():
    torch.manual_seed(len(name))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings | options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    ids = torch.tensor([[5, 77, 130, 9, 200, 33, 41]])
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{folder}/{name}.pt")
    model.push_to_hub(f"alice/{name}")
"""


@pytest.fixture(scope="module")
def pushed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Push adapters of peft to a Hub, and return the folder of peft's logits."""
    folder = tmp_path_factory.mktemp("pushed")
    with HfServer(folder / "server") as server, pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", "hf_write")
        patch.setenv("HF_HOME", str(folder / "hf-home"))
        command = [sys.executable, "-W", "ignore", "-c", PUSH]
        arguments = [str(base_folder), str(folder), json.dumps(LORAS)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (folder / "url").write_text(server.url)
        yield folder


@pytest.fixture(autouse=True)
def at_the_hub(home: Path, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", (pushed / "url").read_text())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in LORAS if name != "activated"])
def test_the_same_logits(name: str, pushed: Path, base_folder: Path, base_model: Any) -> None:
    ran = run_hub("pull", f"hf:alice/{name}", "--json")
    assert ran.code == 0, ran.err
    expert = Registry.read().find_expert(Reference.parse(name))
    assert ran.json["pulled"] == [{"name": f"{name}@1", "digest": expert.digest}]
    theirs = torch.load(pushed / f"{name}.pt", weights_only=True)
    recipe = {"base": str(base_folder), "experts": [name], "merge": {"method": "linear"}}
    ours = hub.compose(recipe)
    torch.testing.assert_close(logits(ours.model), theirs, atol=1e-5, rtol=1e-5)
    assert (logits(base_model) - theirs).abs().max() > 0.1


def test_what_is_no_change_of_the_weights_is_refused(home: Path) -> None:
    """An activated LoRA acts only after some tokens."""
    ran = run_hub("pull", "hf:alice/activated")
    assert (ran.code, ran.out) == (3, ""), ran.err
    assert "alora_invocation_tokens is [77, 130]" in ran.lines("error: ")[0]
    assert len(ran.lines("hint: ")) == 1
    assert not list((home / "objects").rglob("*"))
