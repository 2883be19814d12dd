"""`hub trace`: show which experts each token chooses."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from experthub.cli import _completion
from experthub.cli._options import (
    DeviceOption,
    FrozenOption,
    JsonOption,
    LockedOption,
    LongOption,
    RegistryOption,
)
from experthub.cli._output import choose_pins, print_json, print_lines, print_message, print_table
from experthub.cli._session import open_session
from experthub.cli.compose import RecipeArgument

if TYPE_CHECKING:
    from experthub.hub.bases.base import Base
    from experthub.hub.tracing.trace import Trace

COLUMNS = 8  # The largest number of experts in the table of layers.

PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="A text to read; repeat the option for more texts."),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        "-t",
        help="Read the first examples of this task instead of prompts.",
        autocompletion=_completion.list_tasks,
    ),
]
LimitOption = Annotated[
    int, typer.Option(help="The largest number of examples of the task.", min=1)
]
TopOption = Annotated[int, typer.Option(help="The number of experts shown for each token.", min=1)]
GenerateOption = Annotated[
    int,
    typer.Option(
        "--generate", help="The number of tokens to generate and trace after each prompt.", min=0
    ),
]
ModuleOption = Annotated[
    str | None,
    typer.Option("--module", metavar="REGEX", help="Trace only modules whose whole path matches."),
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Format the prompts with the base's chat template.")
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write an HTML page that shows the trace."),
]
OpenOption = Annotated[bool, typer.Option("--open", help="Open the page of --html in a browser.")]


def trace(
    recipe: RecipeArgument,
    prompts: PromptOption = None,
    task: TaskOption = None,
    limit: LimitOption = 4,
    generate: GenerateOption = 0,
    chat: ChatOption = False,
    module: ModuleOption = None,
    top: TopOption = 3,
    long: LongOption = "cut",
    html: HtmlOption = None,
    open_: OpenOption = False,
    locked: LockedOption = False,
    frozen: FrozenOption = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    registry: RegistryOption = None,
) -> None:
    """Show which experts of a route each token chooses.

    The first table has a row for each token, and the second one a row for each layer. --json and
    --html also give the weights in every module.

    Examples: hub trace recipe.yaml --prompt "Where do penguins live?";
    hub trace recipe.yaml --prompt "Name three fruits." --chat --generate 16 --html trace.html --open;
    hub trace recipe.yaml --task bigbench:implicatures --limit 2 --module ".*q_proj" --json
    """
    from experthub.hub.composition.compose import compose as compose_model
    from experthub.hub.errors import UsageError
    from experthub.hub.files.atomic import write_text
    from experthub.hub.files.memory import reuse_memory
    from experthub.hub.files.path_checks import check_file
    from experthub.hub.readers.scorer import parse_long
    from experthub.hub.recipes.lock import plan_of
    from experthub.hub.tracing.page import render_page
    from experthub.hub.tracing.trace import check_traceable
    from experthub.hub.tracing.trace import trace as trace_texts

    if open_ and html is None:
        raise UsageError("--open needs the page that --html writes", "add --html trace.html")
    if html is not None:
        check_file(html)
    reuse_memory()
    rule = parse_long(long)
    with open_session(registry, device) as session:
        plan = plan_of(recipe, choose_pins(locked, frozen), session=session)
        check_traceable(plan, module)
        texts = _choose_texts(plan.base, prompts or [], task, limit)
        found = trace_texts(
            compose_model(plan, session=session),
            texts,
            modules=module,
            new_tokens=generate,
            chat=chat,
            tasks=[task] * len(texts) if task else None,
            long=rule,
            session=session,
        )
    for name in found.left_out:
        print_message(f"note: {name} does not read every token once, and is omitted")
    if html is not None:
        write_text(html, render_page(found))
        print_message(f"wrote {html}")
    if json:
        print_json(found.record(), compact=True)
    else:
        print_trace(found, top)
    if open_ and html is not None:
        _open_page(html)


def _choose_texts(base: Base, prompts: list[str], task: str | None, limit: int) -> list[str]:
    """Return the prompts, or the first examples of the task."""
    from experthub.hub.errors import UsageError
    from experthub.hub.tracing.prompts import read_prompts

    if bool(prompts) == (task is not None):
        raise UsageError(
            "no text to trace was given"
            if not prompts
            else "--prompt and --task exclude each other",
            'pass a text with --prompt "...", or a task with --task',
        )
    return prompts if task is None else read_prompts(base, task, limit)


def _open_page(html: Path) -> None:
    """Open a page in a browser."""
    import webbrowser

    if not webbrowser.open(html.resolve().as_uri()):
        print_message(f"note: no browser was found; open {html} in a browser")


def print_trace(trace: Trace, top: int) -> None:
    """Print a row for each token with its largest weights, and then a row for each layer.

    Args:
        trace: The trace.
        top: The number of experts for each token.
    """
    labels, several = trace.experts, trace.tokens[-1].prompt > 0
    k = min(top, len(labels))
    rows = []
    for token, weights_E in zip(trace.tokens, trace.means_TE, strict=True):
        values, experts = weights_E.topk(k)
        pairs = zip(values.tolist(), experts.tolist(), strict=True)
        cells = [c for v, e in pairs for c in ((labels[e], f"{v:.2f}") if v else ("", ""))]
        place = f"{token.prompt + 1}:{token.position}" if several else str(token.position)
        mark = "+" if token.written else ""
        rows.append(
            [place, mark, dumps(token.text, ensure_ascii=False) if token.text else "…", *cells]
        )
    print_table(
        [">#", "", "token", *(c for i in range(k) for c in (f"expert {i + 1}", ">weight"))], rows
    )
    _print_layers(trace)


def _print_layers(trace: Trace) -> None:
    """Print a row for each layer: mean weights and entropies."""
    layers, labels = trace.layers, trace.experts
    order = trace.means_TE.mean(0).argsort(descending=True, stable=True).tolist()
    shown, others = order[:COLUMNS], order[COLUMNS:]
    rows = []
    for layer in layers:
        cells = [f"{layer.weights[e]:.2f}" for e in shown]
        if others:
            cells.append(f"{sum(layer.weights[e] for e in others):.2f}")
        for entropy in (layer.entropy, layer.usage_entropy):
            cells += [f"{entropy:.2f}", f"{layer.normalise(entropy):.2f}"]
        rows.append(["-" if layer.layer < 0 else str(layer.layer), *cells])
    columns = [*(labels[e] for e in shown), *([f"{len(others)} others"] if others else [])]
    print_lines([""])
    print_table(
        [">layer", *(f">{c}" for c in [*columns, "entropy", "share", "in use", "share"])], rows
    )
    print_lines(
        [
            "",
            f"weights: the mean over {len(trace.modules)} modules, and for a layer also over "
            f"{len(trace.tokens)} tokens; + marks generated tokens",
            "entropy: the entropy of a token's weights in bits, mean over tokens and modules",
            "in use: the entropy of the tokens' mean weights in bits, mean over modules",
            f"share: the entropy divided by log2({len(labels)}) = {layers[0].most:.2f} bits, "
            "its largest possible value",
        ]
    )


def register(app: typer.Typer) -> None:
    """Add the command `trace` to the application."""
    app.command()(trace)
