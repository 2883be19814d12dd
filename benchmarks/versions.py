"""Compare two versions of the project on the same work in one run.

Each version has a process and a virtual environment of its own.  The two run a case by turns, so that
a slow moment of the machine meets both, and every round starts new processes.  The result is the
median of the ratios of the pairs.

Usage: python versions.py OLD_CHECKOUT [--new CHECKOUT] [--rounds N] [--json FILE]

Each checkout is a folder with `.venv/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

import torch
from _bench import LINEARS
from _peer import make_environment
from _version import EXPERTS
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
WIDTH, INNER, LAYERS, HEADS, RANK = 576, 1536, 6, 9, 8
WORDS = ["red", "blue", "green", "grey"]
PAIRS = {  # case -> pairs per round; the cases are those of `_version.py`
    "compose, routed": 10,
    "compose, linear of LoRAs": 10,
    "compose, TIES of task vectors": 4,
    "forward of a route, 512 tokens": 20,
    "forward of a merge, 512 tokens": 20,
    "decode with a route, 10 tokens": 20,
    "compose, AdaMerging of 6 steps": 5,
    "train a LoRA, 10 steps": 5,
}


def make_inputs(folder: Path) -> None:
    """Write a random base, LoRAs with gates, task vectors, and a task.

    Args:
        folder: An empty folder.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    _write_tokenizer(folder / "base")
    state = {n: t for n, t in model.state_dict().items() if n.endswith(_weights())}
    for number in range(EXPERTS):
        _write_lora(folder / f"expert-{number}", number, state)
    for number in range(4):
        random = torch.Generator().manual_seed(number)
        changes = {n: 1e-3 * torch.randn(t.shape, generator=random) for n, t in state.items()}
        (folder / f"vector-{number}").mkdir()
        save_file(changes, folder / f"vector-{number}" / "task_vector.safetensors")
    _write_task(folder / "task")


def _weights() -> tuple[str, ...]:
    """Return the ends of the names of the linear weights that experts change."""
    return tuple(f".{linear}.weight" for linear in LINEARS)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def _write_lora(folder: Path, number: int, state: dict[str, torch.Tensor]) -> None:
    """Write a random LoRA with gates on every linear module."""
    random = torch.Generator().manual_seed(number)
    tensors, gates = {}, {}
    for name, weight in state.items():
        outputs, inputs = weight.shape
        module = name.removesuffix(".weight")
        a = torch.randn(RANK, inputs, generator=random) / inputs**0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        b = 0.01 * torch.randn(outputs, RANK, generator=random)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        gates[f"{module}.gate"] = torch.randn(inputs, generator=random)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": list(LINEARS), "bias": "none", "inference_mode": True}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    save_file(gates, folder / "phatgoose_gates.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_task(folder: Path) -> None:
    """Write a task of colours."""
    from experthub.hub.tasks.task import example_id

    folder.mkdir()
    rows = []
    for number in range(120):
        text = f"The thing of number {number} has the colour"
        row = {"input": text, "choices": WORDS, "answer": number % len(WORDS)}
        rows.append(json.dumps({"id": example_id(text, WORDS), **row}))
    (folder / "examples.jsonl").write_text("\n".join(rows) + "\n")
    card = {"name": "colours", "source": "made up", "template": "{input}"}
    (folder / "card.yaml").write_text(json.dumps(card))  # JSON is valid YAML


class Version:
    """A process that runs the cases of one checkout, one at a time.

    Args:
        checkout: A checkout with `.venv/bin/python`.
        folder: The inputs, see `make_inputs`.
    """

    def __init__(self, checkout: Path, folder: Path) -> None:
        python = checkout.resolve() / ".venv" / "bin" / "python"
        command = [python, "-W", "ignore", HERE / "_version.py", folder]
        self.checkout = checkout
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=make_environment(),
        )

    def run(self, case: str) -> float:
        """Run a case once, and return its seconds."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.checkout}: the process ended while it ran {case!r}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def run_round(old: Version, new: Version, ratios: dict[str, list[float]]) -> None:
    """Run every case in both versions by turns, and add the ratios of the pairs.

    Args:
        old: The version to compare with.
        new: The other version.
        ratios: Case -> seconds of the new version by those of the old; the ratios are appended.
    """
    for case, pairs in PAIRS.items():
        old.run(case), new.run(case)  # warms up
        for number in range(pairs):
            first, second = (old, new) if number % 2 else (new, old)
            seconds = {first: first.run(case), second: second.run(case)}
            ratios.setdefault(case, []).append(seconds[new] / seconds[old])


def find_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median of some values."""
    random = Random(0)
    medians = sorted(median(random.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    """Compare the versions, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="the checkout to compare with")
    parser.add_argument("--new", type=Path, default=HERE.parent, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with new processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios to this file")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    with TemporaryDirectory() as temporary:
        make_inputs(Path(temporary))
        for number in range(options.rounds):
            old, new = (Version(c, Path(temporary)) for c in (options.old, options.new))
            run_round(old, new, ratios)
            old.close(), new.close()
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    print("| case | pairs | new / old | 95 % |")
    print("| --- | --: | --: | --- |")
    for case, values in ratios.items():
        low, high = find_interval(values)
        print(f"| {case} | {len(values)} | {median(values):.3f} | {low:.3f}-{high:.3f} |")
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=2) + "\n")


if __name__ == "__main__":
    main()
