"""The problem that both sides of the AdaMerging benchmark read: an encoder, task vectors and tasks.

There are eight dense task vectors of all parameters, and eight tasks, each with a frozen head and
unlabelled inputs. Logits are 20 times the cosine between the mean of the last hidden states and the
rows of the head. The module needs torch, transformers and safetensors, but not experthub.
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
REPEATS = 3  # repetitions within one measurement
Batch = dict[str, Tensor]


def write(folder: Path, shapes: Mapping[str, Sequence[int]], width: int, vocabulary: int) -> None:
    """Write random task vectors, heads and inputs, which are the same every time.

    Args:
        folder: The folder for the files.
        shapes: The shape of every parameter of the encoder.
        width: The size of a hidden state.
        vocabulary: The number of token ids.
    """
    for expert in range(EXPERTS):
        random = torch.Generator().manual_seed(expert)
        vector = {n: SIZE * torch.randn(*s, generator=random) for n, s in shapes.items()}
        save_file(vector, folder / f"expert-{expert}.safetensors")
    random = torch.Generator().manual_seed(EXPERTS)
    frequency = 1 / (torch.arange(vocabulary) + 2.7)  # the Zipf-Mandelbrot law of word frequencies
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
    """The heads and the inputs of all tasks, read from the files of a folder.

    Args:
        base: The folder of the encoder.
        folder: The folder that `write` filled.
        dtype: The dtype of the encoder, the heads and the task vectors.
    """

    def __init__(self, base: Path, folder: Path, dtype: str = "float32") -> None:
        self.base, self.folder, self.dtype = base, folder, dtype
        tensors = load_file(folder / "tasks.safetensors")
        kind = getattr(torch, dtype)
        self.heads = [tensors[f"{t}.head"].to(kind) for t in range(TASKS)]
        self.inputs: list[Batch] = [
            {k: tensors[f"{t}.{k}"] for k in ("input_ids", "attention_mask")} for t in range(TASKS)
        ]

    def model(self) -> Any:
        """Load the encoder without dropout, with its parameters in memory instead of mapped from the file."""
        from transformers import AutoModel

        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = AutoModel.from_pretrained(self.base, dtype=self.dtype, **off).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def vector(self, expert: int) -> dict[str, Tensor]:
        """Load a task vector in the dtype of the model.

        Args:
            expert: The number of the expert.

        Returns:
            The change of every parameter.
        """
        found = load_file(self.folder / f"expert-{expert}.safetensors")
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in found.items()}

    def batch(self, task: int, step: int) -> Batch:
        """Return the inputs of a task at a step.

        Args:
            task: The number of the task.
            step: The number of the step.

        Returns:
            Token ids and attention mask, `[INPUTS, TOKENS]` each.
        """
        start = step % BATCHES * INPUTS
        return {k: v[start : start + INPUTS] for k, v in self.inputs[task].items()}

    def logits(self, model: Callable[..., Any], batch: Batch, task: int) -> Tensor:
        """Compute the logits of a batch.

        Args:
            model: The encoder.
            batch: The inputs.
            task: The number of the task, whose head is used.

        Returns:
            The logits `[inputs, classes]`.
        """
        return logits(features(model, batch), self.heads[task])


def features(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Compute the mean of the last hidden states over the tokens that are not padding.

    Args:
        model: The encoder.
        batch: The inputs.

    Returns:
        The features `[inputs, width]`.
    """
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def logits(found: Tensor, head: Tensor) -> Tensor:
    """Compute logits as 20 times the cosine between features and the rows of a head.

    Args:
        found: The features `[inputs, width]`.
        head: The head `[classes, width]`.

    Returns:
        The logits `[inputs, classes]`.
    """
    unit = nn.functional.normalize
    return 20 * unit(found, dim=-1) @ unit(head, dim=-1).T


def together(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches of equal length into one.

    Args:
        batches: The batches.

    Returns:
        One batch with the rows of all.
    """
    return {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}


def seconds(call: Callable[[], object]) -> float:
    """Time a call in seconds.

    Args:
        call: The call to time.

    Returns:
        The time in seconds.
    """
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def anonymous() -> int:
    """Return the bytes of anonymous memory of this process, which belong to no file.

    Raises:
        RuntimeError: If the system does not report them.
    """
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this system does not report anonymous memory: run this on Linux")
    return int(found.group(1)) * 1024


def peak(call: Callable[[], object]) -> int:
    """Return the peak of anonymous memory during a call, sampled every millisecond.

    Args:
        call: The call to measure.

    Returns:
        The peak in bytes.
    """
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
