"""Full fine-tuning: all parameters of a base on one task, kept as a task vector."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.base import load_model, load_tokenizer, without_bars
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import check_free, new_folder
from experthub.hub.finetunes.difference import Difference, take_in
from experthub.hub.finetunes.form import Form
from experthub.hub.finetunes.two_models import Weights, weights_of
from experthub.hub.progress import Report, silent
from experthub.hub.registry.registry import Registry, checked_name
from experthub.hub.store.store import Store
from experthub.hub.tasks.task import read_task
from experthub.hub.training.fit import Settings, fit_task
from experthub.hub.training.objectives import FROZEN, objective_for
from experthub.hub.transfer.describe import run_folder
from torch import nn


def train_full(
    base: str,
    task: str,
    name: str,
    settings: Settings,
    *,
    embeddings: bool = False,
    out: Path | None = None,
    device: str | None = None,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
) -> Difference:
    """Train every parameter of a base on one task's training split, and store what changed.

    embeddings: train them too; a tied output layer is one of them.  out: a new folder for the
    fine-tuned model itself, which is not kept by default.  A run that was interrupted goes on from
    its last checkpoint when it is started again with the same settings.
    """
    registry, store = registry or Registry.read(), store or Store()
    checked_name(name)
    if out is not None:
        check_free(out)
    read = read_task(task)
    found = find(base, registry, report)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", device)
    trained = _unfreeze(model, embeddings, found.causal)
    stored = weights_of(found)
    unknown = sorted(set(trained) - set(stored.shapes))
    if unknown:
        raise HubError(
            f"{found.name} does not store {unknown[0]} under this name",
            "its file has names of an older transformers: save model.state_dict() with safetensors",
        )
    objective = objective_for(found, device)
    record: dict[str, Any] = {"method": "full", **asdict(settings), "embeddings": embeddings}
    key = {"kind": "full", "base": found.fingerprint, "task": read.digest, **record}
    run = run_folder(name, key)
    loss = fit_task(model, objective, read, settings, run, report)
    if out is not None:
        with new_folder(out) as folder, without_bars():
            model.save_pretrained(folder)
            if found.has_tokenizer:
                load_tokenizer(found).save_pretrained(folder)
    record |= {"examples": min(settings.examples, len(read.split("train"))), "loss": loss}
    return take_in(
        found,
        _after(stored, trained),
        name,
        Form(),
        run,
        record=record,
        task=task,
        registry=registry,
        store=store,
        report=report,
    )


def _unfreeze(model: nn.Module, embeddings: bool, causal: bool) -> dict[str, nn.Parameter]:
    """Let the parameters learn that an answer depends on; returns them by name."""
    frozen = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not embeddings
        for parameter in module.parameters()
    }
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in frozen and (causal or not name.startswith(FROZEN))
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _after(stored: Weights, trained: dict[str, nn.Parameter]) -> Weights:
    """A base's weights with the trained ones in their places."""

    def read(name: str) -> torch.Tensor:
        if name in trained:
            return trained[name].detach().cpu()
        return stored.read(name)

    return replace(stored, name="the trained model", read=read)
