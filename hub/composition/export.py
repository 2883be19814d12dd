"""Export of compositions and experts to folders that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from experthub.hub.bases.writing import write_model
from experthub.hub.errors import UsageError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import create_folder, write_text
from experthub.hub.files.json_files import read_json
from experthub.hub.files.path_checks import check_free
from experthub.hub.formats.adapter import ADAPTER, ADAPTER_CONFIG, read_adapter
from experthub.hub.formats.adapter_writer import fold_exactly, fold_scale, write_adapter
from experthub.hub.formats.dense_parts import DENSE_KEYS, HEADS, PREFIX, read_dense_parts
from experthub.hub.formats.safetensors_reader import Tensors
from experthub.hub.kinds import kinds
from experthub.hub.kinds.prompt import SOFT_PROMPT
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.expert import Expert
from experthub.hub.session import Session
from experthub.merge import LowRank, TaskVector
from torch import Tensor

CLASSIFIES = "SEQ_CLS"  # PEFT's type of text classifiers.


def save_model(
    model: Any, plan: Plan, merged: TaskVector, folder: Path, format: Literal["hf", "peft"]
) -> Path:
    """Write a merged model; see `Composition.save`.

    Args:
        model: The composed model.
        plan: The plan that it was made from.
        merged: The task vector that was added to the base.
        folder: A new or empty folder.
        format: `hf` writes the whole model with its tokenizer and processors; `peft` writes one adapter.

    Returns:
        The folder.

    Raises:
        UsageError: The format is `peft`, and the merge is not low-rank.
        ConflictError: The folder is in use.
    """
    check_free(folder)
    with create_folder(folder) as draft:
        if format == "peft":
            _save_peft(model, plan, merged, draft)
        else:
            write_model(plan.base, model, draft)
        write_text(draft / "recipe.lock.yaml", yaml_files.dump(plan.lock))
    return folder


def _save_peft(model: Any, plan: Plan, merged: TaskVector, folder: Path) -> None:
    """Write the merged change as one LoRA of one rank, and the whole head of a classifier."""
    names, head = plan.base.names, _find_head(model, plan)
    embeddings = {a.parameter for m in plan.members for a in m.adapted if a.embedding}
    nests: dict[str, list[str]] = {}
    factors: dict[str, LowRank] = {}
    order = {name: place for place, name in enumerate(names.shapes)}
    for name in sorted(merged.keys() - head.keys(), key=order.__getitem__):
        delta, (module, _, leaf) = merged[name], name.rpartition(".")
        if not isinstance(delta, LowRank) or name in embeddings:
            raise UsageError(
                "the merge is not a low-rank change of linear modules, and the format peft needs one",
                "write a whole model, with --format hf",
            )
        stored = LowRank(delta.a, fold_scale(delta.b, delta.scale, module))
        is_weight = leaf == "weight" and module in names.linear
        turned = names.linear[module] if is_weight else module in names.transposed
        factors[name] = stored.transpose() if turned else stored
        nests.setdefault(module, []).append(name)
    if not factors:
        raise UsageError(
            "the merge changes no linear module", "write a whole model, with --format hf"
        )
    tensors: dict[str, Tensor] = {}
    for module, nest in nests.items():
        for level, name in enumerate(reversed(nest)):  # PEFT wraps the first parameter first.
            wrapper = PREFIX + module + ".base_layer" * level
            tensors[f"{wrapper}.lora_A.weight"] = factors[name].a
            tensors[f"{wrapper}.lora_B.weight"] = factors[name].b
    write_adapter(
        folder,
        tensors,
        base=plan.base.public_name,
        task_type=CLASSIFIES if head else plan.base.peft_task_type,
        model_class=plan.base.architecture,
        transposed=any(names.linear.get(module) for module in nests),
        pad=True,
        dense={PREFIX + name: tensor for name, tensor in head.items()},
        keys={"modules_to_save": sorted({n.partition(".")[0] for n in head})} if head else {},
        parameters={module: nest for module, nest in nests.items() if module not in names.linear},
    )


def _find_head(model: Any, plan: Plan) -> dict[str, Tensor]:
    """Find the parameters of a text classifier's head, which PEFT reads from every adapter of one."""
    if not plan.base.architecture.endswith("ForSequenceClassification") or not plan.base.reads_text:
        return {}
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if name.partition(".")[0] in HEADS[CLASSIFIES]
    }


def export_portable(expert: Expert, folder: Path, session: Session) -> Path:
    """Write an expert as a folder that peft, vLLM, SGLang and llama.cpp can load.

    The LoRA has one rank and no patterns, and its scale is folded into B. The factors keep their
    dtype if that is exact, and are float32 otherwise. Dense parts, which only peft loads, are kept.
    Gates are omitted.

    Args:
        expert: A LoRA in the store.
        folder: The folder to write; it must not exist.
        session: The registry that knows the base, and the store.

    Returns:
        The folder.

    Raises:
        UsageError: The expert is not a LoRA.
        HubError: Float32 cannot hold a factor with its scale.
        ConflictError: The folder exists.
    """
    store = session.store
    kind = kinds[expert.kind]
    if not kind.peft:
        raise UsageError(
            f"{expert.reference} is {kind.label}, and only LoRAs can be exported as adapters",
            "list it in a recipe, and write that with hub compose --out FOLDER --format peft"
            if kind is SOFT_PROMPT
            else "write the model with hub compose --out, or make a LoRA with hub diff --rank",
        )
    check_free(folder)
    config = store.verify_file(expert.digest, ADAPTER_CONFIG)
    adapted = read_adapter(config, store.locate(expert.digest, ADAPTER), expert.reference)
    if any(change.targeted for change in adapted):
        raise UsageError(
            f"{expert.reference} adapts parameters by target_parameters, which only peft can load",
            "write a merge of it with hub compose --out, or use the expert's own files in peft",
        )
    stored = Tensors(store.read(expert.digest, ADAPTER))
    tensors: dict[str, Tensor] = {}
    exact = [fold_exactly(stored[change.b], change.scale) for change in adapted]
    same = all(folded is not None for folded in exact)
    for change, folded in zip(adapted, exact, strict=True):
        a, b = stored[change.a], stored[change.b]
        if folded is None or not same:  # All factors get one dtype.
            a, folded = a.float(), fold_scale(b, change.scale, change.module)
        tensors[change.a], tensors[change.b] = a, folded
    parts = read_dense_parts(config, store.locate(expert.digest, ADAPTER), expert.reference)
    dense = {p.tensor: stored[p.tensor] * p.scale for p in parts}
    known = session.registry.list_bases().get(expert.base)
    base = known.aka[0] if known and known.aka else expert.base
    settings = read_json(config)
    with create_folder(folder) as draft:
        write_adapter(
            draft,
            tensors,
            base=base,
            task_type=settings.get("task_type"),
            transposed=bool(settings.get("fan_in_fan_out")),
            pad=True,
            dense=dense,
            keys={key: settings[key] for key in DENSE_KEYS if settings.get(key)} if dense else {},
        )
    return folder
