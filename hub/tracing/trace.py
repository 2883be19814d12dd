"""Traces: the weights that each token gave to each expert, in every routed module.

Shapes: M modules, T tokens of all prompts, E experts of the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.composition.composition import Composition
from experthub.hub.composition.generation import (
    check_can_generate,
    generate_ids,
    read_prompt,
)
from experthub.hub.composition.overflow import refuse_overflow
from experthub.hub.errors import IntegrityError, UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.patterns import check_pattern, limit_matching_time
from experthub.hub.readers.forward_errors import explain_forward_errors
from experthub.hub.readers.scorer import Long
from experthub.hub.readers.window import Window
from experthub.hub.recipes.plan import Plan, find_layer
from experthub.hub.session import Session
from experthub.hub.tracing.summary import LayerSummary, summarise_layers
from experthub.hub.tracing.tokens import Token, build_tokens
from experthub.routing import record_routing
from torch import Tensor


@dataclass(frozen=True)
class TracedModule:
    """A routed module of a trace.

    Args:
        name: The path of the module.
        layer: The number of its layer, or -1 outside of the layers.
        experts: The positions in the recipe of the experts that adapt it.
    """

    name: str
    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """A record of the experts that tokens chose.

    Args:
        plan: The plan of the composition.
        tokens: The tokens of all prompts.
        modules: The routed modules.
        weights_MTE: The weights; zero if an expert does not adapt the module.
        left_out: Routed modules that do not read every token once, such as a pooler. They are not
            in `modules`.
    """

    plan: Plan
    tokens: tuple[Token, ...]
    modules: tuple[TracedModule, ...]
    weights_MTE: Tensor
    left_out: tuple[str, ...] = ()

    @property
    def experts(self) -> list[str]:
        """The labels of the experts, in the order of the recipe."""
        return [expert.label for expert in self.plan.experts]

    @cached_property
    def means_TE(self) -> Tensor:
        """The mean weights of every token over the modules."""
        return self.weights_MTE.mean(0)

    @cached_property
    def layers(self) -> list[LayerSummary]:
        """The summaries of the layers, sorted by layer."""
        return summarise_layers([module.layer for module in self.modules], self.weights_MTE)

    def summarise(self) -> dict[str, Any]:
        """Return the composition and the summaries of the layers as plain values.

        Returns:
            The document of docs/trace.md without tokens, modules and weights.
        """
        return {
            "composition": self.plan.digest,
            "base": self.plan.base.name,
            "methods": [unit.recipe.method.method for unit in _select_routes(self.plan)],
            "experts": [{"label": e.label, "digest": e.digest} for e in self.plan.experts],
            "layers": [_round_numbers(layer.record()) for layer in self.layers],
            "entropy_unit": "bits",
        }

    def record(self) -> dict[str, Any]:
        """Return the trace as plain values, for `--json`.

        Returns:
            The document of docs/trace.md; its weights are `[module][token][expert]`.
        """
        return {
            **self.summarise(),
            "tokens": [token.record() for token in self.tokens],
            "modules": [
                {"name": m.name, "layer": m.layer, "experts": list(m.experts)} for m in self.modules
            ],
            "left_out": list(self.left_out),
            "weights": _round_numbers(self.weights_MTE.tolist()),
        }


def trace(
    composition: Composition,
    prompts: Sequence[str],
    *,
    modules: str | None = None,
    new_tokens: int = 0,
    chat: bool = False,
    tasks: Sequence[str] | None = None,
    long: Long = "cut",
    session: Session | None = None,
) -> Trace:
    """Let a routed model read prompts, and record which experts each token chose.

    Args:
        composition: A composed model with a route.
        prompts: The prompts, which are read one by one.
        modules: A regular expression that must match a whole module path. The default is all routed
            modules.
        new_tokens: The largest number of tokens that the model generates after each prompt, by
            greedy decoding, and then reads. A token that ends the text is never read.
        chat: Put the prompts into the tokenizer's chat template.
        tasks: The task of each prompt, for a router that routes by task.
        long: `cut` drops the tokens of a prompt that do not fit with those to generate: the first
            ones for a causal language model, the last ones for another base. `refuse` raises an
            error.
        session: The progress callback. The default is `Session()`.

    Returns:
        The weights of the experts, by module and token.

    Raises:
        UsageError: The composition is a merge, the base does not read text alone, there is no
            prompt, a prompt is empty or too long, there is not one task for each prompt, or no
            module matches.
        IntegrityError: The model or a router computes NaN or infinity.

    Example:
        from experthub import hub

        composition = hub.compose("recipe.yaml")
        found = hub.trace(composition, ["I loved every minute."])
        print(found.experts, found.means_TE)
    """
    report = (session or Session()).report
    plan, model = composition.plan, composition.model
    wanted = check_traceable(plan, modules)
    if not prompts:
        raise UsageError("no prompts were given", "pass at least one prompt")
    if tasks is not None and len(tasks) != len(prompts):
        raise UsageError(
            f"{len(tasks)} tasks were named for {len(prompts)} prompts",
            "name one task for each prompt",
        )
    if new_tokens:
        check_can_generate(composition)
    tokenizer, window = load_tokenizer(plan.base), Window.of(plan.base, long, report)
    tokens: list[Token] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for number, prompt in enumerate(prompts):
        report("reading prompts", number, len(prompts))
        ids = read_prompt(plan.base, tokenizer, prompt, chat, window, new_tokens)
        if not ids:
            raise UsageError(f"prompt {number + 1} is empty", "pass some text after --prompt")
        named = composition.tasks(tasks[number]) if tasks else nullcontext()
        with named, record_routing(model, len(plan.experts), set(wanted).__contains__) as found:
            new = _run_model(composition, tokenizer, ids, new_tokens)
        for name, calls in found.items():
            parts[name] += calls
        tokens += build_tokens(tokenizer, ids, new, number)
    return _assemble(composition, tokens, parts)


def check_traceable(plan: Plan, modules: str | None = None) -> list[str]:
    """Check that a plan can be traced, and select its routed modules.

    Args:
        plan: A plan.
        modules: A regular expression that must match a whole module path. None selects all routed
            modules.

    Returns:
        The paths of the selected modules.

    Raises:
        UsageError: The plan is a merge, the base does not read text alone, or no module matches.
    """
    base, routed = plan.base, [] if plan.virtual_tokens else _select_routes(plan)
    if not routed:
        merges = " and ".join(method.method for method in plan.recipe.methods)
        raise UsageError(
            f"{merges}: {'soft prompts have' if plan.virtual_tokens else 'a merge has'} no routing to trace",
            "use a recipe with route: over LoRAs",
        )
    classifier = base.architecture.endswith("ForSequenceClassification")
    config = read_json(base.folder / "config.json")
    seen = {"vision_config", "image_size", "is_encoder_decoder"} & {
        k for k, v in config.items() if v
    }
    if seen or not (base.is_causal or base.is_encoder or classifier):
        raise UsageError(
            f"{base.name} is a {base.architecture}, which does not read text alone, token by token",
            "use a causal language model, a text encoder or a text classifier as the base",
        )
    return _match_modules(
        [n.removesuffix(".weight") for u in routed for n in u.parameters], modules
    )


def _select_routes(plan: Plan) -> list[Plan]:
    """Select the routes among a plan's parts, or the plan itself if it has no parts."""
    return [unit for unit in plan.units if unit.recipe.route is not None]


def _match_modules(routed: list[str], pattern: str | None) -> list[str]:
    """Select the modules whose whole path a pattern matches; None selects all."""
    if pattern is None:
        return routed
    try:
        expression = re.compile(check_pattern(pattern))
        with limit_matching_time():
            found = [name for name in routed if expression.fullmatch(name)]
    except (ValueError, TimeoutError) as error:
        raise UsageError(f"--module: {error}", "write a simpler pattern") from None
    if not found:
        raise UsageError(
            f"no routed module matches {pattern!r}",
            f"write a pattern that matches a whole path, such as {routed[0]}",
        )
    return found


@torch.no_grad()
def _run_model(
    composition: Composition, tokenizer: Any, ids: list[int], new_tokens: int
) -> list[int]:
    """Let the model read and continue a text; return the generated tokens that it has read."""
    if new_tokens:
        return generate_ids(composition, tokenizer, ids, new_tokens + 1)[
            :-1
        ]  # The last token is generated but never read.
    ids_1T = torch.tensor([ids], device=composition.model.device)
    with refuse_overflow(composition), explain_forward_errors(composition.model):
        composition.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))
    return []


def _assemble(
    composition: Composition, tokens: list[Token], parts: dict[str, list[Tensor]]
) -> Trace:
    """Assemble the trace from each module's recorded weights, without modules that skip tokens."""
    model = composition.model
    weights = {name: torch.cat(own) for name, own in parts.items() if own}
    whole = {name: w_TE for name, w_TE in weights.items() if len(w_TE) == len(tokens)}
    if not whole:
        raise UsageError(
            f"no routed module reads every token once: {', '.join(list(parts)[:3])}",
            "use a recipe that routes other modules",
        )
    modules = [
        TracedModule(name, find_layer(name), model.get_submodule(name).experts) for name in whole
    ]
    for name, w_TE in whole.items():
        if not bool(torch.isfinite(w_TE).all()):
            token = int((~torch.isfinite(w_TE)).any(1).nonzero()[0])
            raise IntegrityError(
                f"the router of {name} computes NaN or infinity for token {token}",
                "set smaller weights for the experts, or dtype: float32, in the recipe",
            )
    left_out = tuple(name for name in parts if name not in whole)
    return Trace(
        composition.plan, tuple(tokens), tuple(modules), torch.stack(list(whole.values())), left_out
    )


def _round_numbers(value: Any) -> Any:
    """Round all numbers in plain values to six decimal places."""
    if isinstance(value, dict):
        return {name: _round_numbers(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_round_numbers(own) for own in value]
    return round(value, 6) if isinstance(value, float) else value
