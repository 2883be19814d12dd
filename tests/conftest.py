"""Tiny random models, experts and tasks, in a hub home of their own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from experthub.hub.bases import base as bases
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_model
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of sampled tests as slow, except every n-th."""
    seen: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many attacks were tried, and how many of them got in."""
    calls = {
        outcome: [r for r in terminalreporter.getreports(outcome) if "attack" in r.keywords]
        for outcome in ("passed", "failed")
    }
    tried = sum(len(reports) for reports in calls.values())
    if tried:
        terminalreporter.write_line(f"attacks: {tried} tried, {len(calls['failed'])} got in")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HUB_HOME, and a current folder without a registry."""
    for name in ("HUB_OFFLINE", "HUB_DEBUG", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, because no file of these tests has to outlast a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def tiny_llama(folder: Path, seed: int = 0, tied: bool = True, **changes: Any) -> Path:
    """A random two-layer Llama with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    """A random two-layer BERT encoder with a character-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=132,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {c: i for i, c in enumerate(["[PAD]", "[UNK]", *map(chr, range(128))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(base_folder: Path) -> Base:
    return bases.read(base_folder, str(base_folder))


@pytest.fixture
def base_model(base: Base) -> Any:
    return load_model(base, None, None)


def make_expert(
    folder: Path,
    base: Path,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = LINEARS,
    gates: bool = True,
    size: float = 0.5,
    **config: Any,
) -> Path:
    """A random PEFT LoRA, written as peft writes it, with random gates."""
    torch.manual_seed(1000 + seed)
    shapes = bases.read(base, "base").shapes
    modules = [
        n.removesuffix(".weight") for n in shapes if n.removesuffix(".weight").endswith(targets)
    ]
    tensors, gate = {}, {}
    for module in modules:
        outputs, inputs = shapes[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs) * size
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank) * size
        gate[f"{module}.gate"] = torch.randn(inputs)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": str(base),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    if gates:
        save_file(gate, folder / "phatgoose_gates.safetensors")
    return folder


@pytest.fixture
def expert_folder(tmp_path: Path, base_folder: Path) -> Callable[..., Path]:
    """Make a random expert of the tiny base: expert_folder(seed, rank=..., targets=...)."""
    count = 0

    def make(seed: int = 0, **options: Any) -> Path:
        nonlocal count
        count += 1
        return make_expert(tmp_path / f"expert-{count}", base_folder, seed, **options)

    return make


@pytest.fixture
def tiny_task() -> str:
    """A task with enough examples for every split."""
    card = Card(name="parity", source="made-up", template="Is {input} even?\nAnswer:")
    examples = []
    for number in range(120):
        choices = ["yes", "no"]
        text = str(number)
        examples.append(
            Example(id=example_id(text, choices), input=text, choices=choices, answer=number % 2)
        )
    return write_task("local", card, examples)


def logits(model: Any, rows: list[list[int]] | None = None) -> torch.Tensor:
    """Logits on a fixed input."""
    ids = torch.tensor(rows or [[5, 77, 130, 9, 200, 33, 41]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@dataclass(frozen=True)
class Ran:
    """The result of a command: its exit code and its output."""

    code: int
    out: str
    err: str

    def lines(self, start: str) -> list[str]:
        """The lines on standard error that begin so."""
        return [line for line in self.err.splitlines() if line.startswith(start)]

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


def run_hub(*arguments: str | Path) -> Ran:
    """The command `hub`, in this process: the real application, with its own exit code."""
    from experthub.cli.main import app

    out, err, code = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGINT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        signal.signal(signal.SIGINT, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def at_once(script: str, *jobs: Sequence[str | Path]) -> list[str]:
    """Run a script with each job's arguments, all at once; what each printed.

    The script does its imports, prints `ready` and reads a line; the lines come together.
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    for process in running:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return printed


def snapshot(folder: Path, *without: str) -> dict[str, str]:
    """Path -> mode and sha256 of every file below a folder, but for those below `without`.

    What lasts as long as a process, its lease and locks, does not count.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        stays = not {"leases", "locks"} & set(path.parts)
        if stays and path.is_file() and not name.startswith(without):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = f"{path.stat().st_mode:o} {digest}"
    return found
