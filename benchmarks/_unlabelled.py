"""What both sides of the AdaMerging benchmark are given, and how they read it: written once, read by both.

An encoder, eight dense task vectors of all its parameters, and for each of eight tasks a frozen
head and unlabelled inputs. Logits are 20 times the cosine between the mean of the last hidden
states and the head's rows. Needs torch, transformers and safetensors, and nothing of the hub.
"""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EXPERTS, TASKS, INPUTS, TOKENS = 8, 8, 16, 32
SIZE, BATCHES, INITIAL, RATE = 0.01, 4, 0.3, 1e-3
REPEATS = 3  # of what is measured once
Batch = dict[str, Tensor]


def write(folder: Path, shapes: Mapping[str, Sequence[int]], width: int, vocabulary: int) -> None:
    """Random task vectors of the parameters, heads and inputs, the same every time."""
    for expert in range(EXPERTS):
        random = torch.Generator().manual_seed(expert)
        vector = {n: SIZE * torch.randn(*s, generator=random) for n, s in shapes.items()}
        save_file(vector, folder / f"expert-{expert}.safetensors")
    random = torch.Generator().manual_seed(EXPERTS)
    frequency = 1 / (torch.arange(vocabulary) + 2.7)  # Zipf and Mandelbrot's, of words in texts
    tensors = {}
    for task in range(TASKS):
        tensors[f"{task}.head"] = torch.randn(2 + 2 * task, width, generator=random)
        shape = (BATCHES * INPUTS, TOKENS)
        tokens = torch.multinomial(frequency, BATCHES * INPUTS * TOKENS, True, generator=random)
        tensors[f"{task}.input_ids"] = tokens.view(shape)
        lengths = torch.randint(TOKENS // 2, TOKENS + 1, shape[:1], generator=random)
        mask = torch.arange(TOKENS) < lengths[:, None]
        tensors[f"{task}.attention_mask"] = mask.long()
    save_file(tensors, folder / "tasks.safetensors")


class Problem:
    """The files of a folder, read."""

    def __init__(self, base: Path, folder: Path, dtype: str = "float32") -> None:
        self.base, self.folder, self.dtype = base, folder, dtype
        tensors = load_file(folder / "tasks.safetensors")
        kind = getattr(torch, dtype)
        self.heads = [tensors[f"{t}.head"].to(kind) for t in range(TASKS)]
        self.inputs: list[Batch] = [
            {k: tensors[f"{t}.{k}"] for k in ("input_ids", "attention_mask")} for t in range(TASKS)
        ]

    def model(self) -> Any:
        """The encoder without dropout, its parameters in memory and not in the file's pages."""
        from transformers import AutoModel

        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = AutoModel.from_pretrained(self.base, dtype=self.dtype, **off).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def vector(self, expert: int) -> dict[str, Tensor]:
        """A task vector, as wide as the model."""
        found = load_file(self.folder / f"expert-{expert}.safetensors")
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in found.items()}

    def batch(self, task: int, step: int) -> Batch:
        start = step % BATCHES * INPUTS
        return {k: v[start : start + INPUTS] for k, v in self.inputs[task].items()}

    def logits(self, model: Callable[..., Any], batch: Batch, task: int) -> Tensor:
        return logits(features(model, batch), self.heads[task])


def features(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The mean of the last hidden states where there is no padding."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def logits(found: Tensor, head: Tensor) -> Tensor:
    unit = nn.functional.normalize
    return 20 * unit(found, dim=-1) @ unit(head, dim=-1).T


def together(batches: Sequence[Batch]) -> Batch:
    """Batches of one width as one."""
    return {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}


def seconds(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def anonymous() -> int:
    """The bytes of this process's memory that are no pages of files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this system does not say how much memory is anonymous")
    return int(found.group(1)) * 1024


def peak(call: Callable[[], object]) -> int:
    """The most anonymous memory while something ran, looked at every millisecond."""
    most, done = anonymous(), threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return most
