"""Train a LoRA or the gates of an expert on one task, with the base frozen."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.composition.weight_reads import WeightReads
from experthub.hub.composition.weights import Contents, load_task_vector
from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.atomic import create_folder
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG, GATES, read_adapter
from experthub.hub.kinds import kinds
from experthub.hub.kinds.placement import place_changes
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.content import Content
from experthub.hub.registry.entries import check_name
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.hub.tasks.task_files import read_task
from experthub.hub.training.fit import Settings, fit_task
from experthub.hub.training.objectives import find_frozen, make_objective
from experthub.hub.training.targets import ALL_LINEAR, Targets, choose_targets
from experthub.hub.transfer.describe import create_checkpoint_folder, describe
from experthub.hub.transfer.pull import pull
from experthub.hub.transfer.remotes.no_network import forbid_network
from experthub.merge import LowRank, find_weight_reads
from experthub.routing import ExpertStack, RoutedLinear, make_gate, uniform
from torch import Tensor, nn

# Below this loss of an expert at half its strength, training gives its gates no reason to open.
LEARNED = 0.01


def train_lora(
    base: str,
    task: str,
    name: str,
    settings: Settings,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: str = ALL_LINEAR,
    session: Session | None = None,
) -> Expert:
    """Train a LoRA on the linear layers of a base, on one task's training split, and store it.

    An interrupted run continues from its last checkpoint if it is started again with the same
    settings. The loss curve is `loss.json` in the run's folder, `$HUB_HOME/runs/<name>-<digest of
    the settings>`.

    Args:
        base: The base: a registry name, a folder, `hf:...` or `pypi:...`.
        task: The task's reference.
        name: The name of the expert in the user's own registry.
        settings: Steps, batch size, learning rate, examples and seed.
        rank: The rank of every LoRA, at least 1.
        alpha: LoRA's alpha. The default is twice the rank.
        targets: The layers: `all-linear`, names with commas between them, or a regular expression
            that matches whole paths. The fused experts of a mixture can be named, too.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The registered expert, the next version of its name.

    Raises:
        UsageError: The name is malformed, the device cannot be used, or `targets` selects no layer.
        HubError: The base or the task cannot be read, peft refuses the layers, or training diverged.

    Example:
        >>> from experthub import hub
        >>> base, task = "smollm2-135m-instruct", "bigbench:intent_recognition"
        >>> settings = hub.Settings(steps=100)
        >>> hub.train_lora(base, task, "intents", settings).reference  # doctest: +SKIP
        'intents@1'
    """
    session = session or Session()
    check_name(name)
    read = read_task(task)
    found = find(base, session)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    objective, never = make_objective(found, session.device), find_frozen(model, found)
    alpha = 2 * rank if alpha is None else alpha
    frozen = [n for n, _ in model.named_modules() if n.startswith(never)]
    chosen = choose_targets(targets, found, model.config.model_type, frozen)
    adapted = _adapt(model, chosen, rank, alpha, found)
    record = {**asdict(settings), "rank": rank, "alpha": alpha}
    record |= {} if targets == ALL_LINEAR else {"targets": targets}
    key = {"kind": "lora", "base": found.digest, "task": read.digest, **record}
    run = create_checkpoint_folder(name, key)
    _save_lora(adapted, found, run / "untrained")
    _check_accepted(run / "untrained", found)
    loss = fit_task(adapted, objective, read, settings, run, session.report)
    _save_lora(adapted, found, run / "expert")
    record |= {"examples": min(settings.examples, len(read.split("train"))), "loss": loss}
    return describe(run / "expert", name, found, session, task=task, training=record)


def _adapt(model: Any, chosen: Targets, rank: int, alpha: float, base: Base) -> Any:
    """Put an untrained LoRA into a model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type=base.peft_task_type,
        target_modules=chosen.modules,
        target_parameters=chosen.parameters or None,
        exclude_modules=chosen.excluded or None,
    )
    try:
        with forbid_network(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They are about settings that peft corrects itself.
            adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise HubError(
            f"base {base.name}: peft cannot adapt it: {reason}",
            "choose other layers with --targets",
        ) from None
    return adapted


def _save_lora(adapted: Any, found: Base, to: Path) -> None:
    """Write a LoRA in bfloat16 as peft does."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(to, ignore_errors=True)
    with create_folder(to) as folder:
        written = adapted.peft_config["default"]
        written.base_model_name_or_path = found.public_name
        # These are sets in peft. Their order differs between processes, and the digest would, too.
        written.target_modules = sorted(written.target_modules)
        written.target_parameters = sorted(written.target_parameters or ()) or None
        written.exclude_modules = sorted(written.exclude_modules or ()) or None
        # The default looks for the base's name at the Hub, to compare the vocabularies.
        with forbid_network():
            adapted.save_pretrained(folder, save_embedding_layers=False)
        half = {n: t.bfloat16() for n, t in load_file(folder / ADAPTER).items()}
        save_file(half, folder / ADAPTER, metadata={"format": "pt"})
        (folder / "README.md").unlink(missing_ok=True)


def _check_accepted(folder: Path, base: Base) -> None:
    """Check, before it is trained, that a LoRA will be accepted as an expert of its base."""
    adapted = read_adapter(folder / ADAPTER_CONFIG, folder / ADAPTER, "the LoRA to be trained")
    place_changes(adapted, base.names, "the LoRA to be trained", base.name)
    shutil.rmtree(folder)


def train_gate(
    name: str,
    settings: Settings,
    *,
    start: float = 0.5,
    session: Session | None = None,
) -> Expert:
    """Train PHATGOOSE's gates for a stored expert, on the task that it was trained on.

    Base and expert are frozen. Each adapted linear layer gets one vector, zero at first, whose
    sigmoid weights the expert's output for every token (Muqeeth et al., section 3.1).

    Args:
        name: The expert's reference.
        settings: Steps, batch size, learning rate, examples and seed.
        start: The expert's weight before training, in (0, 1). The paper's 0.5 leaves most of the
            expert in place. If half of the expert is enough to solve the task, its gates have no
            reason to open, and routers do not choose it. A small start, such as 0.1, avoids that.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The expert with its gates, registered as the next version of its name.

    Raises:
        UsageError: `start` is out of range, the expert is not a LoRA, or its task is not recorded.
        NotFoundError: No registry knows the expert.
        HubError: The base or the task cannot be read, or training diverged.

    Example:
        >>> from experthub import hub
        >>> hub.train_gate("intents", hub.Settings(steps=30, lr=5e-3)).reference  # doctest: +SKIP
        'intents@2'
    """
    if not 0 < start < 1:
        raise UsageError(f"a gate cannot start at {start:g}", "choose a start between 0 and 1")
    session = session or Session()
    expert = session.registry.find_expert(Reference.parse(name))
    kind = kinds[expert.kind]
    if not kind.peft:
        raise UsageError(
            f"{expert.reference} is {kind.label}, and gates belong to a LoRA",
            "name a LoRA, or make one with hub diff --rank",
        )
    if expert.task is None:
        raise UsageError(
            f"the registry does not say which task {expert.reference} was trained on",
            "add the expert again with hub add --task",
        )
    read = read_task(expert.task)
    pull(session, Content.from_expert(expert))
    found = find(expert.base, session)
    torch.manual_seed(settings.seed)
    model = load_model(found, "float32", session.device)
    objective = make_objective(found, session.device)
    gated = _insert_gates(model, expert, start, session)
    # The paper's start is not recorded, so that the folders of earlier runs keep their names.
    record = {**asdict(settings), **({} if start == 0.5 else {"start": start})}
    key = {"kind": "gate", "expert": expert.digest, "task": read.digest, **record}
    run = create_checkpoint_folder(f"{expert.name}-gate", key)
    loss = fit_task(model, objective, read, settings, run, session.report)
    if loss["first"] < LEARNED and start >= 0.5:
        session.report(
            f"note: the loss of {expert.reference} was {loss['first']:.4f} before its gates were "
            "trained, which gives them no reason to open; use --start 0.1 to start nearly closed",
            0,
            0,
        )
    gates = {
        f"{module}.gate": linear.probes_PI[0].detach().cpu()
        for module, linear in gated.items()
        if linear.probes_PI is not None
    }
    _write_expert(run / "expert", expert, gates, session.store)
    training = {**expert.training, "gate": {**record, "loss": loss}}
    return describe(
        run / "expert",
        expert.name,
        found,
        session,
        task=expert.task,
        training=training,
        like=expert,
    )


def _write_expert(to: Path, expert: Expert, gates: Mapping[str, Tensor], store: Store) -> None:
    """Write the files of an expert to a new folder, with these gates in place of its own."""
    from safetensors.torch import save_file

    half = {n: g.bfloat16().contiguous() for n, g in gates.items()}
    with create_folder(to) as folder:
        store.copy_out(expert.digest, folder)
        (folder / GATES).unlink(missing_ok=True)
        save_file(half, folder / GATES, metadata={"format": "pt"})


def _insert_gates(
    model: nn.Module, expert: Expert, start: float, session: Session
) -> dict[str, RoutedLinear]:
    """Put the expert and a trainable gate beside every linear module that the expert adapts."""
    recipe = Recipe.of(
        {
            "base": expert.base,
            "experts": [expert.reference],
            "route": {"method": uniform.__name__},
        }
    )
    plan = resolve(recipe, session=session)
    with Contents(plan.members, session.store, gates=False) as contents:
        vector = load_task_vector(plan.experts[0], plan, contents)
    gated, reads = {}, find_weight_reads(model)
    for parameter in plan.parameters:
        module = parameter.removesuffix(".weight")
        delta = vector[parameter]
        if isinstance(delta, LowRank):
            stack = ExpertStack.of({0: delta}, 1)
            linear = RoutedLinear.from_stack(
                model.get_submodule(module),
                stack,
                make_gate(stack, start),
                train_probes=True,
            )
            model.set_submodule(module, linear)
            gated[module] = linear
    WeightReads.attach(model, {path: read for path, read in reads.items() if path in gated})
    return gated
