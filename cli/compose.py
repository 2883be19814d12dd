"""compose, generate: recipes become models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from experthub.cli._output import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    RegistryOption,
    megabytes,
    pins_of,
    print_fields,
    print_json,
    print_table,
    say,
)
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.recipes.plan import Plan

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe.yaml.")]


def compose(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the model to this new folder.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
    format: Annotated[
        str, typer.Option("--format", help="hf: a whole model; peft: one LoRA adapter.")
    ] = "hf",
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Print what a recipe will do, or with --out compose it and write the model.

    Examples: hub compose recipe.yaml; hub compose recipe.yaml --out ./model;
    hub compose recipe.yaml --out ./adapter --format peft; hub compose recipe.yaml --locked --out ./model
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.files.path_checks import check_free
    from experthub.hub.recipes.lock import plan_of

    if format not in ("hf", "peft"):
        raise UsageError(f"unknown format {format!r}", "use hf or peft")
    kind: Literal["hf", "peft"] = "peft" if format == "peft" else "hf"
    with open_session(registry, device) as session:
        resolved = plan_of(recipe, pins_of(locked, frozen), session=session)
        if out is not None and not plan:
            if resolved.routed:
                raise UsageError(
                    "a routed model is more than a set of weights, and cannot be written as one",
                    "use the recipe where the model is used (hub generate, hub eval, hub.compose), "
                    "or write merge: instead of route:",
                )
            check_free(out)
            from experthub.hub.composition.compose import compose as composed

            composed(resolved, session=session).save(out, kind)
    if json:
        print_json({"plan": resolved.record()} | ({"out": str(out)} if out and not plan else {}))
    else:
        _print_plan(resolved)
        if out is not None and not plan:
            say(f"wrote {out}")


def _print_plan(plan: Plan) -> None:
    modules = {name.rpartition(".")[0] for name in plan.parameters}
    print_fields(
        {
            "base": f"{plan.base.name}  {plan.base.fingerprint[:19]}",
            **_ways(plan),
            "changes": f"{len(plan.parameters)} weights in {len(modules)} modules",
            **_learned(plan),
            "dtype": plan.dtype,
            "reads": megabytes(plan.reads),
            "memory": megabytes(plan.memory),
            "digest": plan.digest,
        }
    )
    rows = [
        [
            e.label,
            f"{e.weight:g}",
            m.reference,
            m.digest[:19],
            m.kind,
            str(len(m.changes)),
            megabytes(m.size),
        ]
        for e in plan.experts
        for m in e.members
    ]
    print_table(["expert", ">weight", "from", "digest", "kind", ">weights", ">size"], rows)


def _ways(plan: Plan) -> dict[str, str]:
    """The method, or that of every part with the modules that are its own."""
    found = {}
    for number, unit in enumerate(plan.units, 1):
        method = unit.recipe.method
        options = ", ".join(f"{k} {v}" for k, v in method.options.items())
        said = method.method + (f" ({options})" if options else "")
        if plan.parts:
            said = f"{method.kind} {said}: {len(unit.parameters)} of {unit.recipe.targets}"
        found[f"part {number}" if plan.parts else method.kind] = said
    return found


def _learned(plan: Plan) -> dict[str, str]:
    """Where what a method found is from: the coefficients of a merge, a router's state."""
    if plan.found is not None:
        kind = "router" if plan.recipe.route else "coefficients"
        return {kind: f"{plan.found.reference}  {plan.found.digest[:19]}"}
    if plan.data is None:
        return {}
    use = plan.data.use
    seen = f"{', '.join(use.tasks)} ({use.split}, {'with' if use.labels else 'no'} labels)"
    return {"learns from": seen}


def generate(
    recipe: RecipeArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = False,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Compose a recipe and let it write.

    Examples: hub generate recipe.yaml --prompt "The capital of France is";
    hub generate recipe.yaml --prompt "Name three fruits." --chat
    """
    from experthub.hub.composition.compose import compose as composed
    from experthub.hub.composition.generation import generate_text
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.recipes.lock import plan_of

    reuse_memory()
    with open_session(registry, device) as session:
        plan = plan_of(recipe, pins_of(locked, frozen), session=session)
        composition = composed(plan, session=session)
        session.report("writing", 0, 0)
        text = generate_text(
            composition, prompt, max_new_tokens=max_new_tokens, temperature=temperature, chat=chat
        )
    if json:
        print_json({"prompt": prompt, "text": text, "recipe": composition.plan.digest})
    else:
        sys.stdout.write(text + "\n")


def register(app: typer.Typer) -> None:
    app.command()(compose)
    app.command()(generate)
