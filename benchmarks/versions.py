"""Compare two versions of the project on the same work in one run.

Every round runs each version once, in its own process with its own virtual environment, so that a
slow moment of the machine meets both.  The result is the ratio of the medians.

Usage: python versions.py OLD_CHECKOUT [--new CHECKOUT] [--rounds N] [--json FILE]

Each checkout is a folder with `.venv/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from _bench import LINEARS
from _version import EXPERTS
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
WIDTH, INNER, LAYERS, HEADS, RANK = 576, 1536, 6, 9, 8
WORDS = ["red", "blue", "green", "grey"]


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


def run_once(checkout: Path, folder: Path, number: int) -> dict[str, float]:
    """Measure one version in its own process.

    Args:
        checkout: A checkout with `.venv/bin/python`.
        folder: The inputs, see `make_inputs`.
        number: The number of the round.

    Returns:
        Case -> seconds.
    """
    command = [checkout / ".venv" / "bin" / "python", HERE / "_version.py", folder, str(number)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Compare the versions, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="the checkout to compare with")
    parser.add_argument("--new", type=Path, default=HERE.parent, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each with both versions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    options = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {"old": {}, "new": {}}
    with TemporaryDirectory() as temporary:
        make_inputs(Path(temporary))
        for number in range(options.rounds + 1):
            sides = ("old", "new") if number % 2 else ("new", "old")
            for side in sides:
                found = run_once(getattr(options, side).resolve(), Path(temporary), number)
                for case, seconds in found.items() if number else ():  # the first warms up
                    times[side].setdefault(case, []).append(seconds)
            print(f"round {number} of {options.rounds}", file=sys.stderr)
    print("| case | old, ms | new, ms | new / old | least new / least old |")
    print("| --- | --: | --: | --: | --: |")
    for case, old in times["old"].items():
        new = times["new"][case]
        ratio, least = median(new) / median(old), min(new) / min(old)
        middle = f"{1000 * median(old):.2f} | {1000 * median(new):.2f} | {ratio:.3f}"
        print(f"| {case} | {middle} | {least:.3f} |")
    if options.json:
        options.json.write_text(json.dumps(times, indent=2) + "\n")


if __name__ == "__main__":
    main()
