"""Checks of the soft prompts and prefixes of a recipe, before a weight is read."""

from __future__ import annotations

from experthub.hub.bases.base import Base
from experthub.hub.bases.building import find_class
from experthub.hub.bases.vocabulary import find_vocabulary
from experthub.hub.errors import HubError, UsageError
from experthub.hub.kinds import kinds
from experthub.hub.readers.window import find_limit
from experthub.hub.recipes.method import Method
from experthub.hub.recipes.planned_experts import Member, PlannedExpert, count_virtual_tokens
from experthub.hub.recipes.recipe import Recipe
from experthub.merge import merges
from experthub.routing import routers

OWN_BASE = "use the base that it was trained on"
NEEDS = frozenset({"data", "index", "task", "texts"})  # Of routers that read no weights of experts.


def check_prompts(recipe: Recipe, experts: tuple[PlannedExpert, ...], base: Base) -> None:
    """Check that soft prompts and prefixes, if the recipe has any, can be composed on the base.

    Args:
        recipe: The recipe.
        experts: The experts of the recipe.
        base: The base.

    Raises:
        UsageError: The recipe mixes them with other experts, or its method cannot use them.
        HubError: Their shapes do not fit the base, or leave no room for a text.
    """
    members = [member for expert in experts for member in expert.members]
    prompts = [member for member in members if member.footprint.prompt is not None]
    if not prompts:
        _refuse_other_experts(recipe, experts)
        return
    others = [member for member in members if member.footprint.prompt is None]
    if others:
        raise UsageError(
            f"{prompts[0].reference} is {_label(prompts[0])} and {others[0].reference} is "
            f"{kinds[others[0].kind].label}, and a recipe has experts of one of these kinds",
            "write a merge of the other experts with hub compose --out FOLDER, and set base: FOLDER "
            "beside the soft prompts",
        )
    if (
        len({member.footprint.prompt.is_prefix for member in prompts if member.footprint.prompt})
        > 1
    ):
        odd = next(m for m in prompts if _label(m) != _label(prompts[0]))
        raise UsageError(
            f"{prompts[0].reference} is {_label(prompts[0])} and {odd.reference} is {_label(odd)}",
            "use soft prompts alone, or prefixes alone",
        )
    _check_methods(recipe, experts, prompts[0])
    _check_base(prompts[0], base, routed=recipe.route is not None)
    for member in prompts:
        _check_shape(member, base)
    _check_room(recipe, experts, base)


def _label(member: Member) -> str:
    """Return the form of a soft prompt, with an article."""
    shape = member.footprint.prompt
    return kinds[member.kind].label if shape is None else shape.label


def _takes_prompts(method: Method) -> bool:
    """Tell whether a method can use soft prompts."""
    if method.kind == "merge":
        return bool(method.strategy.traits.prompts)
    return method.strategy.traits.routing.depth == "model" and NEEDS.issuperset(
        method.strategy.needs
    )


def _refuse_other_experts(recipe: Recipe, experts: tuple[PlannedExpert, ...]) -> None:
    """Refuse a merge of soft prompts whose experts are none."""
    nested = [expert.merge for expert in experts if expert.merge is not None]
    for method in (*recipe.methods, *nested):
        if method.kind == "merge" and method.strategy.traits.prompts:
            member = experts[0].members[0]
            raise UsageError(
                f"{method.method} takes soft prompts, and {member.reference} is "
                f"{kinds[member.kind].label}",
                "use another merge; hub methods lists them",
            )


def _check_methods(recipe: Recipe, experts: tuple[PlannedExpert, ...], first: Member) -> None:
    """Refuse a method that combines weights, and keys of recipes that select modules."""
    given = [key for key in ("parts", "targets", "dense_parts") if getattr(recipe, key)]
    if given:
        raise UsageError(
            f"{given[0]}: selects weights, and {first.reference} is {_label(first)}, "
            "which changes none",
            f"remove {given[0]}:",
        )
    known = [*merges, *routers]
    usable = [
        name
        for catalogue, kind in ((merges, "merge"), (routers, "route"))
        for name in catalogue
        if _takes_prompts(Method(kind=kind, method=name))  # type: ignore[arg-type]
    ]
    nested = [expert.merge for expert in experts if expert.merge is not None]
    for method in (recipe.method, *nested):
        if method.method in known and not _takes_prompts(method):
            raise UsageError(
                f"{method.method} combines weights or activations of modules, and "
                f"{first.reference} is {_label(first)}, which changes none",
                f"use one of {', '.join(usable)}",
            )
    for expert in experts:
        for weight in (expert.weight, *(member.weight for member in expert.members)):
            if weight != 1:
                raise UsageError(
                    f"expert {expert.label} has the weight {weight:g}, and a soft prompt has none",
                    "remove weight:, or leave the expert out",
                )
        if expert.rank is not None:
            raise UsageError(f"{expert.label} has no rank", "remove rank:")


def _check_base(first: Member, base: Base, routed: bool) -> None:
    """Refuse a base whose texts cannot get soft prompts."""
    shape, task_type = first.footprint.prompt, base.peft_task_type
    prefix = shape is not None and shape.is_prefix
    _, config = find_class(base)
    by_layer = getattr(config.get_text_config(), "hidden_size_per_layer_input", None)
    wanted = ("CAUSAL_LM",) if prefix or routed else ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    if task_type not in wanted or by_layer or not base.names.main_input == "input_ids":
        raise UsageError(
            f"{base.name} is a {base.architecture}, and {_label(first)} "
            + ("in a route " if routed else "")
            + "is put before the texts of "
            + (
                "causal language models only"
                if len(wanted) == 1
                else "language models and encoder-decoders only"
            ),
            "use another base, or train a LoRA with hub train lora",
        )


def _check_shape(member: Member, base: Base) -> None:
    """Refuse a soft prompt or a prefix that was trained on a base of other sizes or attention."""
    shape = member.footprint.prompt
    if shape is None:
        return
    if shape.is_prefix:
        if getattr(find_class(base)[1].get_text_config(), "kv_lora_rank", None):
            raise UsageError(
                f"{base.name} is a {base.architecture}, which compresses its keys and values, and "
                f"{member.reference} is {shape.label}, which adds some that are not compressed",
                "use a soft prompt, or train a LoRA with hub train lora",
            )
        found = {"layers": shape.layers, "heads": shape.heads, "features per head": shape.width}
        own = _count_prefix(base)
    else:
        widths = {base.shapes[name][-1] for name in find_vocabulary(base)}
        found, own = {"features": shape.width}, {"features": max(widths, default=0)}
    wrong = [
        f"{found[key]} {key}, and {base.name} has {own[key]}"
        for key in own
        if found[key] != own[key]
    ]
    if wrong:
        raise HubError(f"{member.reference} is {shape.label} with {wrong[0]}", OWN_BASE)


def _count_prefix(base: Base) -> dict[str, int]:
    """Count the layers, the heads of keys and values, and the features of a head of a base."""
    _, config = find_class(base)
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return {
        "layers": int(text.num_hidden_layers),
        "heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "features per head": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
    }


def _check_room(recipe: Recipe, experts: tuple[PlannedExpert, ...], base: Base) -> None:
    """Refuse more virtual tokens than the base can read."""
    count, limit = (
        count_virtual_tokens(experts, recipe.route is not None),
        find_limit(find_class(base)[1], ()),
    )
    if limit is not None and count >= limit:
        raise HubError(
            f"the experts have {count} virtual tokens, and {base.name} reads at most {limit} tokens, "
            "those of the text included",
            "use fewer experts, or shorter soft prompts",
        )
