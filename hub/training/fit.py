"""The training loop: minimise an objective over the trainable parameters of a model."""

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
from experthub.hub.transfer.remotes.no_network import forbid_network
from torch import Tensor, nn
from torch.optim import AdamW

TRAINABLE = "trainable.safetensors"


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of a training run.

    Args:
        steps: Optimiser steps, at least 1.
        examples: The largest number of examples that are taken from the training split.
        batch_size: Examples per step.
        lr: The peak learning rate. It is reached after a tenth of the steps and then falls
            linearly to zero.
        seed: The seed of the initialisation and of the order of examples.

    Example:
        >>> from experthub.hub import Settings
        >>> Settings(steps=100).batch_size
        8
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
    """Minimise an objective over the trainable parameters of a model.

    A checkpoint is written every 20 steps, and an interrupted run continues from the last one. The
    losses of all steps are written to `loss.json`.

    Args:
        model: The model. Only parameters that require a gradient are trained.
        objective: The objective.
        examples: The examples as the objective encodes them.
        settings: Steps, batch size, learning rate and seed.
        run: The folder of checkpoints and of `loss.json`.
        what: The name of the training in progress reports and errors.
        report: A progress callback.
        router_lr: The peak learning rate of parameters whose names end in `logits`. The default is
            `settings.lr`.

    Returns:
        The mean loss of the first ten steps (`first`) and of the last ten (`last`).

    Raises:
        HubError: There are fewer examples than a batch holds.
    """
    from transformers import PrinterCallback, set_seed

    if len(examples) < settings.batch_size:
        raise HubError(
            f"{what}: there are {len(examples)} training examples, "
            f"and a batch needs {settings.batch_size}",
            "lower --batch-size, or choose a task with more examples",
        )

    set_seed(settings.seed)
    trainer = _make_trainer(model, objective, examples, settings, run, what, report)
    if router_lr is not None:
        trainer.optimizer = _make_optimizer(model, settings.lr, router_lr)
    trainer.remove_callback(PrinterCallback)
    with forbid_network():
        trainer.train(resume_from_checkpoint=_find_checkpoint(run))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write_json(run / "loss.json", losses)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"first": _average(losses[:10]), "last": _average(losses[-10:])}


def fit_task(
    model: nn.Module,
    objective: Objective,
    task: Task,
    settings: Settings,
    run: Path,
    report: Report,
) -> dict[str, float]:
    """Minimise an objective on the training split of a task; see `fit`.

    Args:
        model: The model. Only parameters that require a gradient are trained.
        objective: The objective.
        task: The task.
        settings: Steps, examples, batch size, learning rate and seed.
        run: The folder of checkpoints and of `loss.json`.
        report: A progress callback.

    Returns:
        The mean loss of the first ten steps (`first`) and of the last ten (`last`).

    Raises:
        HubError: The task has fewer training examples than a batch holds.
    """
    examples = [objective.encode(task, e) for e in task.split("train", settings.examples)]
    return fit(model, objective, examples, settings, run, f"training on {task.reference}", report)


def _make_trainer(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Any],
    settings: Settings,
    run: Path,
    what: str,
    report: Report,
) -> Any:
    """Make a transformers Trainer that minimises the objective and writes small checkpoints."""
    from safetensors.torch import load_file, save_file
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class ReportProgress(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report(what, state.global_step, settings.steps)

    class ObjectiveTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return objective.compute_loss(model, inputs)

        # A checkpoint holds the trainable part only, because the frozen base never changes.
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(_select_trainable(model), Path(output_dir) / TRAINABLE)

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            stored = load_file(Path(resume_from_checkpoint) / TRAINABLE)
            for name, parameter in _select_trainable(self.model).items():
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
        data_collator=objective.collate,
        callbacks=[ReportProgress()],
    )


def _make_optimizer(model: nn.Module, lr: float, router_lr: float) -> AdamW:
    """Make an AdamW that trains the routers' logits with their own learning rate."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    routers = [p for n, p in trained if n.endswith("logits")]
    others = [p for n, p in trained if not n.endswith("logits")]
    groups = [{"params": others, "lr": lr}, {"params": routers, "lr": router_lr}]
    return AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _find_checkpoint(run: Path) -> str | None:
    """Return the newest complete checkpoint, which is one with a state file; it is written last."""
    whole = [c for c in run.glob("checkpoint-*") if (c / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def _select_trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _average(values: Sequence[float]) -> float:
    """Return the mean, rounded to four decimals."""
    return round(sum(values) / len(values), 4)
