"""Fitting the trainable part of a model to the right answers of a task."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError
from experthub.hub.files.atomic import write_json
from experthub.hub.progress import Report
from experthub.hub.tasks.task import Task
from experthub.hub.training.objectives import Objective
from torch import Tensor, nn
from torch.optim import AdamW

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
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Any],
    settings: Settings,
    run: Path,
    what: str,
    report: Report,
    router_lr: float | None = None,
) -> dict[str, float]:
    """Minimise an objective over the trainable parameters.

    examples: as the objective's rows.  what: for messages.  router_lr: peak learning rate of
    parameters called `logits`, that of the others by default.  Checkpoints every 20 steps into `run`; goes on from the last one.  Writes `loss.json`, a list
    of losses by step; returns the mean of the first and of the last ten.
    """
    from transformers import PrinterCallback, set_seed

    if len(examples) < settings.batch_size:
        raise HubError(
            f"{what}: there are {len(examples)} training examples, "
            f"a batch needs {settings.batch_size}",
            "choose a smaller batch or another task",
        )

    set_seed(settings.seed)
    trainer = _trainer(model, objective, examples, settings, run, what, report)
    if router_lr is not None:
        trainer.optimizer = _two_rates(model, settings.lr, router_lr)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(run))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write_json(run / "loss.json", losses)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"first": _mean(losses[:10]), "last": _mean(losses[-10:])}


def fit_task(
    model: nn.Module,
    objective: Objective,
    task: Task,
    settings: Settings,
    run: Path,
    report: Report,
) -> dict[str, float]:
    """`fit` on a task's training split."""
    examples = [objective.row(task, e) for e in task.split("train", settings.examples)]
    return fit(model, objective, examples, settings, run, f"training on {task.reference}", report)


def _trainer(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Any],
    settings: Settings,
    run: Path,
    what: str,
    report: Report,
) -> Any:
    """transformers' trainer, for the objective's loss and with small checkpoints."""
    from safetensors.torch import load_file, save_file
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report(what, state.global_step, settings.steps)

    class ObjectiveTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return objective.loss(model, inputs)

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
    return ObjectiveTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=objective.batch,
        callbacks=[Watch()],
    )


def _two_rates(model: nn.Module, lr: float, router_lr: float) -> AdamW:
    """AdamW with a rate of its own for routers' logits."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    routers = [p for n, p in trained if n.endswith("logits")]
    others = [p for n, p in trained if not n.endswith("logits")]
    groups = [{"params": others, "lr": lr}, {"params": routers, "lr": router_lr}]
    return AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _last_checkpoint(run: Path) -> str | None:
    """The newest checkpoint that was written whole: its state file is written last."""
    whole = [c for c in run.glob("checkpoint-*") if (c / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
