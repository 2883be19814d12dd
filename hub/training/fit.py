"""Fitting the trainable part of a model to the right answers of a task."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experthub.hub._files import write_json
from experthub.hub.bases import Report
from experthub.hub.errors import HubError
from experthub.hub.tasks.task import Task
from torch import Tensor, nn

TRAINABLE = "trainable.safetensors"


@dataclass(frozen=True)
class Settings:
    """How to train: all numbers that change the result.

    steps: optimiser steps, at least 1.  examples: of the training split, at most.  batch_size:
    examples per step.  lr: peak learning rate, reached over the first tenth, then falling
    linearly to zero.  seed: of initialisation and order.
    """

    steps: int
    examples: int = 480
    batch_size: int = 8
    lr: float = 2e-3
    seed: int = 0


def fit(
    model: nn.Module, tokenizer: Any, task: Task, settings: Settings, run: Path, report: Report
) -> dict[str, float]:
    """Minimise the loss of the right answers' tokens over the trainable parameters.

    Checkpoints every 20 steps into `run`; goes on from the last one.  Writes `loss.json`, a list
    of losses by step; returns the mean of the first and of the last ten.
    """
    from transformers import PrinterCallback, set_seed

    examples = [
        _tokens(tokenizer, task.prompt(e), task.right_answer(e))
        for e in task.split("train", settings.examples)
    ]
    if len(examples) < settings.batch_size:
        raise HubError(
            f"{task.reference} has {len(examples)} training examples, "
            f"a batch needs {settings.batch_size}",
            "choose a smaller batch or another task",
        )

    set_seed(settings.seed)
    trainer = _trainer(model, examples, settings, run, f"training on {task.reference}", report)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(run))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write_json(run / "loss.json", losses)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"first": _mean(losses[:10]), "last": _mean(losses[-10:])}


def _trainer(
    model: nn.Module,
    examples: list[tuple[list[int], int]],
    settings: Settings,
    run: Path,
    what: str,
    report: Report,
) -> Any:
    """transformers' trainer, for the answers' loss and with small checkpoints."""
    from safetensors.torch import load_file, save_file
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report(what, state.global_step, settings.steps)

    class AnswerTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return answer_loss(model, **inputs)

        # A checkpoint is the trainable part: the frozen base is the same in every one.
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(_trainable(model), Path(output_dir) / TRAINABLE)

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            stored = load_file(Path(resume_from_checkpoint) / TRAINABLE)
            for name, parameter in _trainable(self.model).items():
                parameter.copy_(stored[name])

    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=settings.steps,
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=math.ceil(settings.steps / 10),
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=20,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        seed=settings.seed,
        use_cpu=next(model.parameters()).device.type == "cpu",
        log_level="error",
        dataloader_pin_memory=False,
    )
    return AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=_collate,
        callbacks=[Watch()],
    )


def _last_checkpoint(run: Path) -> str | None:
    """The newest checkpoint that was written whole: its state file is written last."""
    whole = [c for c in run.glob("checkpoint-*") if (c / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _tokens(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and where the answer starts."""
    ids = tokenizer(prompt + answer)["input_ids"]
    return ids, len(tokenizer(prompt)["input_ids"])


def _collate(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Right-padded ids, and targets that are -100 outside of the answers, shifted by one."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    targets_BT = torch.full((len(rows), width), -100)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (ids, start) in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        mask_BT[i, : len(ids)] = 1
        targets_BT[i, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "targets": targets_BT}


def answer_loss(model: Any, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of the mean cross-entropy of their answers' tokens.

    The logits are computed at the answers only: most of a short prompt's cost would be the output
    layer.  input_ids, attention_mask, targets: `[B, T]`.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    chosen = targets >= 0
    logits = causal.get_output_embeddings()(hidden[chosen])
    losses = nn.functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
    row = chosen.nonzero()[:, 0]
    sums = torch.zeros(len(targets), device=losses.device).index_add(0, row, losses)
    return (sums / chosen.sum(1)).mean()
