"""Training objectives: encode the examples of a task, collate them into batches, compute the loss.

Shapes: B examples, T tokens, C choices, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.reader import Reader, find_pad_token, pad, refuse_image
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.readers.similarity import SCALE, Similarity, find_rule
from experthub.hub.readers.tokens import encode
from experthub.hub.readers.window import Window
from experthub.hub.tasks.task import Example, Task
from experthub.hub.training.output_layer import OutputLayer
from torch import Tensor, nn

# Prefixes of modules that training does not change. A bare encoder's embedding omits its pooler, and
# all experts share the classifier heads of the base and the text encoder of CLIP or SigLIP.
FROZEN = ("pooler.", "classifier", "score", "text_model.", "text_projection", "logit_")


def find_frozen(model: Any, base: Base) -> tuple[str, ...]:
    """Find the modules of a model that training does not change.

    Args:
        model: The model of the base.
        base: The base.

    Returns:
        The beginnings of their paths. In a causal language model these are the parts that read
        images or sounds, because tasks of text do not use them.
    """
    if not base.is_causal:
        return FROZEN
    if not base.is_multimodal:
        return ()
    text, prefix = set(model.get_decoder().modules()), model.base_model_prefix
    parts = model.base_model.named_children()
    return tuple(f"{prefix}.{name}." for name, m in parts if text.isdisjoint(m.modules()))


class Objective(Protocol):
    """A training objective: a loss over batches of encoded examples."""

    def encode(self, task: Task, example: Example) -> Any:
        """Encode one example.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The example in the form that `collate` takes.
        """
        ...

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Collate encoded examples into a batch.

        Args:
            rows: The encoded examples.

        Returns:
            The batch in the form that `compute_loss` takes.
        """
        ...

    def compute_loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Compute the loss of a batch.

        Args:
            model: The model, which may be wrapped by peft.
            batch: The batch.

        Returns:
            The mean loss of the examples, a scalar with gradients.
        """
        ...


def make_objective(base: Base, device: str | None) -> Objective:
    """Make the objective for the kind of model that a base is.

    Args:
        base: The base.
        device: The torch device of models that the objective loads.

    Returns:
        The objective.

    Raises:
        UsageError: The model's architecture cannot score choices.
    """
    if base.is_causal:
        return AnswerLoss(load_tokenizer(base), Window.of(base))
    if base.is_encoder:
        loaded = cache(lambda: load_model(base, "float32", device))
        tokenizer, window = load_tokenizer(base), Window.of(base)
        return SimilarityLoss(Similarity(loaded, tokenizer, window, find_rule(base)))
    return ChoiceLoss(reader_for(base, device))


@dataclass(frozen=True)
class AnswerLoss:
    """The objective of a causal model: the cross-entropy of the right answer after the prompt.

    Args:
        tokenizer: The tokenizer of the base.
        window: The window of the base. A prompt that does not fit loses its first tokens.
        output: The output layer, which runs at the answers' positions only.
    """

    tokenizer: Any
    window: Window | None = None
    output: OutputLayer = field(default_factory=OutputLayer)

    def encode(self, task: Task, example: Example) -> tuple[list[int], int]:
        """Tokenize the prompt with the right answer.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The token ids of the prompt and the answer, and the position at which the answer starts.
        """
        prompt, answer = task.format_prompt(example), task.format_answer(example)
        refuse_image(example.input)
        (found,) = encode(self.tokenizer, prompt, [answer], self.window)
        return [*found.prompt, *found.choices[0]], len(found.prompt)

    def collate(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Pad token ids on the right and mark the tokens to predict.

        Args:
            rows: The encoded examples.

        Returns:
            `input_ids`, `attention_mask` and `targets`, each `[B, T]`. A target is the next token,
            and -100 where that token is not part of the answer.
        """
        ids_BT, real_BT = pad([ids for ids, _ in rows], "cpu")
        targets_BT = torch.full(ids_BT.shape, -100)
        for i, (ids, start) in enumerate(rows):
            targets_BT[i, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
        return {"input_ids": ids_BT, "attention_mask": real_BT.long(), "targets": targets_BT}

    def compute_loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Compute the mean cross-entropy of each answer's tokens, averaged over the examples.

        Args:
            model: The model, which may be wrapped by peft.
            batch: The batch.

        Returns:
            The loss.
        """
        causal, targets = _unwrap(model), batch["targets"]
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        chosen = targets >= 0
        with explain_forward_errors(causal):
            logits = self.output.compute_logits(causal, read, chosen)
        losses = nn.functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
        zeros = torch.zeros(len(targets), device=losses.device)
        return (zeros.index_add(0, chosen.nonzero()[:, 0], losses) / chosen.sum(1)).mean()


@dataclass(frozen=True)
class SimilarityLoss:
    """The objective of a sentence encoder: the cross-entropy over the choices of an example.

    The logits are the scaled cosines between the input's embedding and the base's embeddings of the
    choices, which stay frozen.

    Args:
        similarity: The scorer that embeds the choices.
    """

    similarity: Similarity

    def encode(self, task: Task, example: Example) -> tuple[tuple[int, ...], Tensor, int]:
        """Tokenize the input and embed the choices.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The token ids, the embeddings of the choices `[C, D]`, and the index of the right one.

        Raises:
            UsageError: The example has no choices, or its answer is not among them.
        """
        answer, question = task.require_answer(example), self.similarity.question(task, example)
        tokens = self.similarity.tokenise(question.text)
        return tokens, self.similarity.heads(question.choices), answer

    def collate(self, rows: Sequence[tuple[tuple[int, ...], Tensor, int]]) -> dict[str, Any]:
        """Pad the choices.

        Args:
            rows: The encoded examples.

        Returns:
            `texts`, the token ids of each text, `heads` `[B, C, D]`, the mask `choices` `[B, C]`,
            which is false for padding, and `answers` `[B]`.
        """
        heads_BCD = nn.utils.rnn.pad_sequence([heads for _, heads, _ in rows], batch_first=True)
        counts = torch.tensor([len(heads) for _, heads, _ in rows])
        return {
            "texts": [ids for ids, _, _ in rows],
            "heads": heads_BCD,
            "choices": torch.arange(heads_BCD.shape[1]) < counts[:, None],
            "answers": torch.tensor([answer for _, _, answer in rows]),
        }

    def compute_loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Compute the cross-entropy of the scaled cosines, averaged over the examples.

        Args:
            model: The model, which may be wrapped by peft.
            batch: The batch.

        Returns:
            The loss.
        """
        encoder, device = _unwrap(model), batch["heads"].device
        ids_BT, real_BT = pad(batch["texts"], device, token=find_pad_token(encoder))
        with explain_forward_errors(encoder):
            text_BD = self.similarity.pool(encoder, ids_BT, real_BT)
        logits_BC = SCALE * torch.einsum("bcd,bd->bc", batch["heads"], text_BD)
        logits_BC = logits_BC.masked_fill(~batch["choices"], float("-inf"))
        return nn.functional.cross_entropy(logits_BC, batch["answers"])


@dataclass(frozen=True)
class ChoiceLoss:
    """The objective of all other bases: the cross-entropy over the choices of an example.

    Args:
        reader: The reader that computes the logits of the choices.
    """

    reader: Reader

    def encode(self, task: Task, example: Example) -> tuple[Any, int]:
        """Prepare the input for the model.

        Args:
            task: The task of the example.
            example: The example.

        Returns:
            The input as the model reads it, and the index of the right choice.

        Raises:
            UsageError: The example has no choices, or its answer is not among them.
        """
        answer = task.require_answer(example)
        return self.reader.row(self.reader.question(task, example)), answer

    def collate(self, rows: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        """Separate the inputs from the answers.

        Args:
            rows: The encoded examples.

        Returns:
            `rows`, a list of B inputs, and `answers` `[B]`.
        """
        return {"rows": [row for row, _ in rows], "answers": torch.tensor([a for _, a in rows])}

    def compute_loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Compute the cross-entropy of the logits of the choices, averaged over the examples.

        Args:
            model: The model, which may be wrapped by peft.
            batch: The batch.

        Returns:
            The loss.
        """
        inner = _unwrap(model)
        with explain_forward_errors(inner):
            logits_BC = self.reader.read(inner, batch["rows"])
        return nn.functional.cross_entropy(logits_BC, batch["answers"])


def _unwrap(model: Any) -> Any:
    """Return the transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
