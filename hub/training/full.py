"""Full fine-tuning: train all parameters of a base on one task, and store the change."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.bases.writing import write_model
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import create_folder
from experthub.hub.files.path_checks import check_free
from experthub.hub.finetunes.difference import Difference, store_difference
from experthub.hub.finetunes.form import Form
from experthub.hub.finetunes.two_models import StoredWeights, open_weights
from experthub.hub.registry.entries import check_name
from experthub.hub.session import Session
from experthub.hub.tasks.task_files import read_task
from experthub.hub.training.fit import Settings, fit_task
from experthub.hub.training.objectives import find_frozen, make_objective
from experthub.hub.transfer.describe import create_checkpoint_folder
from torch import nn


def train_full(
    base: str,
    task: str,
    name: str,
    settings: Settings,
    *,
    embeddings: bool = False,
    out: Path | None = None,
    session: Session | None = None,
) -> Difference:
    """Train every parameter of a base on one task's training split, and store the change.

    An interrupted run continues from its last checkpoint if it is started again with the same
    settings.

    Args:
        base: The base: a registry name, a folder, `hf:...` or `pypi:...`.
        task: The task's reference.
        name: The name of the expert in the user's own registry.
        settings: Steps, batch size, learning rate, examples and seed.
        embeddings: Train the embeddings too, and with them a tied output layer.
        out: A new folder for the fine-tuned model, which is not kept by default.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The registered task vector and its figures.

    Raises:
        UsageError: The name is malformed, or the device cannot be used.
        ConflictError: The folder `out` exists.
        HubError: The base or the task cannot be read, or training diverged.

    Example:
        >>> from experthub import hub
        >>> base, task = "all-minilm-l6-v2", "bigbench:intent_recognition"
        >>> settings = hub.Settings(steps=100, lr=5e-5)
        >>> made = hub.train_full(base, task, "intents-full", settings)  # doctest: +SKIP
        >>> made.expert.kind  # doctest: +SKIP
        'task_vector'
    """
    session = session or Session()
    check_name(name)
    if out is not None:
        check_free(out)
    read = read_task(task)
    found = find(base, session)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    trained = _unfreeze(model, embeddings, find_frozen(model, found))
    stored = open_weights(found)
    trained = _name_as_stored(model, trained, stored)
    objective = make_objective(found, session.device)
    record: dict[str, Any] = {"method": "full", **asdict(settings), "embeddings": embeddings}
    key = {"kind": "full", "base": found.digest, "task": read.digest, **record}
    run = create_checkpoint_folder(name, key)
    loss = fit_task(model, objective, read, settings, run, session.report)
    if out is not None:
        with create_folder(out) as folder:
            write_model(found, model, folder)
    record |= {"examples": min(settings.examples, len(read.split("train"))), "loss": loss}
    return store_difference(
        found,
        _replace_trained(stored, trained),
        name,
        Form(),
        run,
        session,
        record=record,
        task=task,
    )


def _unfreeze(
    model: nn.Module, embeddings: bool, never: tuple[str, ...]
) -> dict[str, nn.Parameter]:
    """Make the parameters trainable that an answer depends on, and return them by name."""
    frozen = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not embeddings
        for parameter in module.parameters()
    }
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in frozen and not name.startswith(never)
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _name_as_stored(
    model: nn.Module, trained: dict[str, nn.Parameter], stored: StoredWeights
) -> dict[str, nn.Parameter]:
    """Return trained parameters by the names that the files have: tied ones may have several."""
    wanted = {id(parameter): name for name, parameter in trained.items()}
    found = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in wanted and name in stored.shapes
    }
    lost = wanted.keys() - {id(parameter) for parameter in found.values()}
    if lost:
        raise HubError(
            f"{stored.name} does not store {min(wanted[i] for i in lost)}, which would be trained",
            "save the whole model again with save_pretrained",
        )
    return found


def _replace_trained(stored: StoredWeights, trained: dict[str, nn.Parameter]) -> StoredWeights:
    """Return the weights of a base with the trained ones in place of the stored ones."""

    def read(name: str) -> torch.Tensor:
        if name in trained:
            return trained[name].detach().cpu()
        return stored.read(name)

    return replace(stored, name="the trained model", read=read)
