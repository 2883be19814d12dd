"""What training minimises: a task's examples as rows, rows as batches, batches as a loss.

Shapes: B examples, T tokens, C choices, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from experthub.hub.bases.base import Base, load_model, load_tokenizer
from experthub.hub.readers.reader import Reader
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.readers.similarity import MAX_TOKENS, SCALE, Similarity, pool
from experthub.hub.tasks.task import Example, Task
from torch import Tensor, nn

# What a bare encoder's embedding does not pass through, and the heads of classifiers and CLIP,
# which stay the base's: experts share them.
FROZEN = ("pooler.", "classifier", "score", "text_model.", "text_projection", "logit_scale")


class Objective(Protocol):
    """How an example of a task becomes a part of a loss."""

    def row(self, task: Task, example: Example) -> Any: ...

    def batch(self, rows: Sequence[Any]) -> dict[str, Any]: ...

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor: ...


def objective_for(base: Base, device: str | None) -> Objective:
    """The objective of a base's kind; UsageError for one whose choices have no score."""
    if base.causal:
        return Answers(load_tokenizer(base))
    if base.encoder:
        loaded = cache(lambda: load_model(base, "float32", device))
        return Labels(Similarity(loaded, load_tokenizer(base)))
    return Choices(reader_for(base, device))


@dataclass(frozen=True)
class Answers:
    """The cross-entropy of the right answer's tokens after the prompt, for a causal model."""

    tokenizer: Any

    def row(self, task: Task, example: Example) -> tuple[list[int], int]:
        """Token ids of prompt and answer, and where the answer starts."""
        prompt = task.prompt(example)
        ids = self.tokenizer(prompt + task.right_answer(example))["input_ids"]
        return ids, len(self.tokenizer(prompt)["input_ids"])

    def batch(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Right-padded ids, and targets that are -100 outside of the answers, shifted by one."""
        ids_BT, mask_BT = _padded([ids for ids, _ in rows])
        targets_BT = torch.full(ids_BT.shape, -100)
        for i, (ids, start) in enumerate(rows):
            targets_BT[i, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "targets": targets_BT}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean over examples of the mean cross-entropy of their answers' tokens.

        The logits are computed at the answers only: most of a short prompt's cost would be the
        output layer.
        """
        causal, targets = _bare(model), batch["targets"]
        hidden = causal.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        chosen = targets >= 0
        logits = causal.get_output_embeddings()(hidden[chosen])
        losses = nn.functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
        row = chosen.nonzero()[:, 0]
        sums = torch.zeros(len(targets), device=losses.device).index_add(0, row, losses)
        return (sums / chosen.sum(1)).mean()


@dataclass(frozen=True)
class Labels:
    """The cross-entropy over an example's choices, by an encoder with frozen heads of their text."""

    similarity: Similarity

    def row(self, task: Task, example: Example) -> tuple[list[int], Tensor, int]:
        """Token ids, the choices' heads `[C, D]`, and the place of the right one."""
        question = self.similarity.question(task, example)
        tokens = self.similarity.tokenizer(question.text, truncation=True, max_length=MAX_TOKENS)[
            "input_ids"
        ]
        return tokens, self.similarity.heads(question.choices), task.answer(example) or 0

    def batch(self, rows: Sequence[tuple[list[int], Tensor, int]]) -> dict[str, Tensor]:
        """Padded ids, heads `[B, C, D]`, which of the C are choices, and the right ones."""
        ids_BT, mask_BT = _padded([ids for ids, _, _ in rows])
        heads_BCD = nn.utils.rnn.pad_sequence([heads for _, heads, _ in rows], batch_first=True)
        counts = torch.tensor([len(heads) for _, heads, _ in rows])
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "heads": heads_BCD,
            "choices": torch.arange(heads_BCD.shape[1]) < counts[:, None],
            "answers": torch.tensor([answer for _, _, answer in rows]),
        }

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean over examples of the cross-entropy of the scaled cosines."""
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        text_BD = pool(_bare(model), read)
        logits_BC = SCALE * torch.einsum("bcd,bd->bc", batch["heads"], text_BD)
        logits_BC = logits_BC.masked_fill(~batch["choices"], float("-inf"))
        return nn.functional.cross_entropy(logits_BC, batch["answers"])


@dataclass(frozen=True)
class Choices:
    """The cross-entropy over an example's choices, by the logits of a base's reader."""

    reader: Reader

    def row(self, task: Task, example: Example) -> tuple[Any, int]:
        """The input as the model reads it, and the place of the right choice."""
        return self.reader.row(self.reader.question(task, example)), task.answer(example) or 0

    def batch(self, rows: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        return {"rows": [row for row, _ in rows], "answers": torch.tensor([a for _, a in rows])}

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Mean over examples."""
        logits_BC = self.reader.read(_bare(model), batch["rows"])
        return nn.functional.cross_entropy(logits_BC, batch["answers"])


def _bare(model: Any) -> Any:
    """The transformers model inside of what peft made of it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids `[B, T]` and their mask."""
    width = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for i, ids in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        mask_BT[i, : len(ids)] = 1
    return ids_BT, mask_BT
