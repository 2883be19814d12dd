"""`hub compose` and `hub generate`: show the plan of a recipe, write its model, or use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from experthub.cli._options import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    LongOption,
    RegistryOption,
)
from experthub.cli._output import (
    choose_pins,
    format_megabytes,
    print_fields,
    print_json,
    print_message,
    print_table,
    print_text,
)
from experthub.cli._session import open_session

if TYPE_CHECKING:
    from experthub.hub.recipes.plan import Plan

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]


def compose(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the composed model to this new folder.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show the plan, even if --out is set.")
    ] = False,
    format: Annotated[
        str,
        typer.Option(
            "--format", help="The format of --out: hf (a whole model) or peft (one LoRA)."
        ),
    ] = "hf",
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Show the plan of a recipe, or write its model.

    The plan lists the base, the experts, the method, the changed weights and the memory that
    composing needs. Without --out, only the headers of files are read.

    Examples: hub compose recipe.yaml; hub compose recipe.yaml --out ./model;
    hub compose recipe.yaml --out ./adapter --format peft; hub compose recipe.yaml --locked --out ./model
    """
    from experthub.hub.errors import UsageError
    from experthub.hub.files.path_checks import check_free
    from experthub.hub.recipes.lock import plan_of

    if format not in ("hf", "peft"):
        raise UsageError(f"unknown format {format!r}", "use hf or peft")
    kind: Literal["hf", "peft"] = "peft" if format == "peft" else "hf"
    if out is not None and not plan:
        check_free(out)
    with open_session(registry, device) as session:
        resolved = plan_of(recipe, choose_pins(locked, frozen), session=session)
        if out is not None and not plan:
            if resolved.routed:
                raise UsageError(
                    "a routed model is more than a set of weights, and cannot be written as one",
                    "use the recipe with hub generate, hub eval or hub.compose, "
                    "or set merge: instead of route:",
                )
            from experthub.hub.composition.compose import write_model

            write_model(resolved, out, kind, session)
    if json:
        print_json({"plan": resolved.record()} | ({"out": str(out)} if out and not plan else {}))
    else:
        _print_plan(resolved)
        if out is not None and not plan:
            print_message(f"wrote {out}")


def _print_plan(plan: Plan) -> None:
    """Print the fields of a plan, and a table of its experts."""
    modules = {name.rpartition(".")[0] for name in plan.parameters}
    print_fields(
        {
            "base": f"{plan.base.name}  {plan.base.digest[:19]}",
            **_describe_unused(plan),
            **_describe_methods(plan),
            "changes": f"{len(plan.parameters)} weights in {len(modules)} modules"
            if not plan.virtual_tokens
            else f"no weights; {plan.virtual_tokens} virtual tokens before each text",
            **_describe_state(plan),
            "dtype": plan.dtype,
            "reads": format_megabytes(plan.reads),
            "memory": format_megabytes(plan.memory),
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
            format_megabytes(m.size),
        ]
        for e in plan.experts
        for m in e.members
    ]
    print_table(["expert", ">weight", "from", "digest", "kind", ">weights", ">size"], rows)


def _describe_unused(plan: Plan) -> dict[str, str]:
    """Describe the stored weights of the base that its model does not use."""
    if not plan.unused:
        return {}
    count = len(plan.unused)
    weights = f"{count} weights of the base, such as" if count > 1 else "1 weight of the base:"
    return {"not used": f"{weights} {plan.unused[0]}"}


def _describe_methods(plan: Plan) -> dict[str, str]:
    """Describe the method, or the method of each part with the weights that it covers."""
    found = {}
    for number, unit in enumerate(plan.units, 1):
        method = unit.recipe.method
        options = ", ".join(f"{k} {v}" for k, v in method.options.items())
        text = method.method + (f" ({options})" if options else "")
        if plan.parts:
            count = len(unit.parameters)
            text = f"{method.kind} {text}: {count} weights that match {unit.recipe.targets}"
        found[f"part {number}" if plan.parts else method.kind] = text
    return found


def _describe_state(plan: Plan) -> dict[str, str]:
    """Describe the stored state of a method, or the data from which it will be learned."""
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
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="The largest number of tokens to generate.", min=1)
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            help="The sampling temperature; 0 always takes the most likely token.", min=0.0
        ),
    ] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Format the prompt with the base's chat template.")
    ] = False,
    long: LongOption = "cut",
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Compose a recipe, and continue a prompt with the model.

    An encoder-decoder writes its answer to the prompt. The text is one beam, whatever the base's
    settings of generation ask for.

    Examples: hub generate recipe.yaml --prompt "The capital of France is";
    hub generate recipe.yaml --prompt "Name three fruits." --chat
    """
    from experthub.hub.composition.compose import compose as compose_model
    from experthub.hub.composition.generation import check_temperature, generate_text
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.readers.scorer import parse_long
    from experthub.hub.recipes.lock import plan_of

    check_temperature(temperature)
    rule = parse_long(long)
    reuse_memory()
    with open_session(registry, device) as session:
        plan = plan_of(recipe, choose_pins(locked, frozen), session=session)
        composition = compose_model(plan, session=session)
        session.report("generating", 0, 0)
        text = generate_text(
            composition,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=chat,
            long=rule,
            report=session.report,
        )
    if json:
        print_json({"prompt": prompt, "text": text, "recipe": composition.plan.digest})
    else:
        print_text(text)


def register(app: typer.Typer) -> None:
    """Add the commands `compose` and `generate` to the application."""
    app.command()(compose)
    app.command()(generate)
