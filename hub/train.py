"""Training experts and their gates on one task, with the base frozen."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from experthub.hub._files import digest_of, hub_home, new_folder, write_json
from experthub.hub.bases import Report, find, load_model, load_tokenizer, silent
from experthub.hub.describe import describe
from experthub.hub.errors import HubError, UsageError
from experthub.hub.expert import ADAPTER, GATES, Expert, Reference
from experthub.hub.plan import resolve
from experthub.hub.pull import pull
from experthub.hub.recipe import Recipe
from experthub.hub.registry import Registry, checked_name, next_version
from experthub.hub.store import Store
from experthub.hub.tasks import Task, read_task
from experthub.hub.weights import task_vector
from experthub.merge import LowRank
from experthub.routing import ExpertStack, RoutedLinear, untrained_gate
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


def train_lora(
    base: str,
    task: str,
    name: str,
    settings: Settings,
    *,
    rank: int = 4,
    alpha: float | None = None,
    device: str | None = None,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
) -> Expert:
    """Train a LoRA on every linear layer of a base, on one task's training split, and store it.

    rank: of every LoRA, at least 1.  alpha: LoRA's alpha, twice the rank by default.  A run that
    was interrupted goes on from its last checkpoint when it is started again with the same
    settings.  The loss curve is `loss.json` in the run's folder, `$HUB_HOME/runs/<name>`.
    """
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    registry, store = registry or Registry.read(), store or Store()
    checked_name(name)
    version = next_version(name, registry.experts())
    read = read_task(task)
    found = find(base, registry, report)
    tokenizer = load_tokenizer(found)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", device)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        task_type="CAUSAL_LM",
        target_modules="all-linear",
    )
    adapted = get_peft_model(model, config)
    record = {**asdict(settings), "rank": rank, "alpha": config.lora_alpha}
    key = {"kind": "lora", "base": found.fingerprint, "task": read.digest, **record}
    run = _run_folder(name, key)
    loss = fit(adapted, tokenizer, read, settings, run, report)
    with new_folder(run / "expert") as folder:
        adapted.peft_config["default"].base_model_name_or_path = found.name
        adapted.save_pretrained(folder)
        half = {n: t.bfloat16() for n, t in load_file(folder / ADAPTER).items()}
        save_file(half, folder / ADAPTER, metadata={"format": "pt"})
        (folder / "README.md").unlink(missing_ok=True)
    record |= {"examples": min(settings.examples, len(read.split("train"))), "loss": loss}
    return describe(run / "expert", name, version, found, store, task=task, training=record)


def train_gate(
    name: str,
    settings: Settings,
    *,
    device: str | None = None,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
) -> Expert:
    """Train PHATGOOSE's gates for a stored expert, on the data it was trained on itself.

    Base and expert are frozen; each adapted linear gets one vector, zero at first, whose sigmoid
    weighs the expert's output for every token (Muqeeth et al., section 3.1).  The result is the
    next version of the expert.
    """
    from safetensors.torch import save_file

    registry, store = registry or Registry.read(), store or Store()
    expert = registry.expert(Reference.parse(name))
    if expert.task is None:
        raise UsageError(
            f"{expert.reference} does not say which task it was trained on",
            "add it again with --task",
        )
    read = read_task(expert.task)
    pull(expert, store, report)
    found = find(expert.base, registry, report)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", device)
    gated = _gated(model, expert, registry, store)
    key = {"kind": "gate", "expert": expert.digest, "task": read.digest, **asdict(settings)}
    run = _run_folder(f"{expert.name}-gate", key)
    loss = fit(model, load_tokenizer(found), read, settings, run, report)
    gates = {
        f"{module}.gate": linear.probes_PI[0].detach().cpu()
        for module, linear in gated.items()
        if linear.probes_PI is not None
    }
    with new_folder(run / "expert") as folder:
        store.copy_out(expert.digest, folder)
        (folder / GATES).unlink(missing_ok=True)
        save_file(
            {n: g.bfloat16().contiguous() for n, g in gates.items()},
            folder / GATES,
            metadata={"format": "pt"},
        )
    training = {**expert.training, "gate": {**asdict(settings), "loss": loss}}
    version = next_version(expert.name, registry.experts())
    return describe(
        run / "expert",
        expert.name,
        version,
        found,
        store,
        task=expert.task,
        training=training,
        like=expert,
    )


def _gated(
    model: nn.Module, expert: Expert, registry: Registry, store: Store
) -> dict[str, RoutedLinear]:
    """Put the expert, and a trainable gate, beside every linear that it adapts."""
    recipe = Recipe.of(
        {
            "base": expert.base,
            "experts": [expert.reference],
            "route": {"method": "uniform"},
        }
    )
    plan = resolve(recipe, registry, store)
    vector = task_vector(plan.experts[0], plan, store)
    gated = {}
    for parameter in plan.parameters:
        module = parameter.removesuffix(".weight")
        delta = vector[parameter]
        if isinstance(delta, LowRank):
            stack = ExpertStack.of({0: delta}, 1)
            linear = RoutedLinear(
                model.get_submodule(module), stack, untrained_gate(stack), train_probes=True
            )
            model.set_submodule(module, linear)
            gated[module] = linear
    return gated


def _run_folder(name: str, key: dict[str, Any]) -> Path:
    """A folder for checkpoints that belongs to exactly these settings, data and weights."""
    digest = digest_of(key)
    folder = hub_home() / "runs" / f"{name}-{digest[7:19]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", key)
    shutil.rmtree(folder / "expert", ignore_errors=True)
    return folder


def fit(
    model: nn.Module, tokenizer: Any, task: Task, settings: Settings, run: Path, report: Report
) -> dict[str, float]:
    """Minimise the loss of the right answers' tokens over the trainable parameters.

    Checkpoints every 20 steps into `run`; goes on from the last one.  Writes `loss.json`, a list
    of losses by step; returns the mean of the first and of the last ten.
    """
    from safetensors.torch import load_file, save_file
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

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

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report(f"training on {task.reference}", state.global_step, settings.steps)

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

    set_seed(settings.seed)
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
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=_collate,
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(run))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write_json(run / "loss.json", losses)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {"first": _mean(losses[:10]), "last": _mean(losses[-10:])}


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
