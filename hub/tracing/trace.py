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
from experthub.hub.bases.base import Base, load_tokenizer
from experthub.hub.composition.composition import Composition
from experthub.hub.composition.generation import check_generates, generate_ids, in_chat
from experthub.hub.errors import UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.patterns import check_pattern, limit_matching_time
from experthub.hub.readers.similarity import MAX_TOKENS
from experthub.hub.recipes.plan import Plan, layer_of
from experthub.hub.session import Session
from experthub.hub.tasks.task_files import read_task
from experthub.hub.tracing.summary import LayerSummary, summed_up
from experthub.hub.tracing.tokens import Token, pieces
from experthub.routing import record_routing
from torch import Tensor


@dataclass(frozen=True)
class Traced:
    """One module of a trace.  layer: its number, -1 outside of the layers.  experts: the places in
    the recipe of those that adapt it."""

    name: str
    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """Which experts some tokens chose.

    weights_MTE: zero where an expert does not adapt the module.  left_out: routed modules that do
    not read every token once, such as a pooler, and are not in the trace.
    """

    plan: Plan
    tokens: tuple[Token, ...]
    modules: tuple[Traced, ...]
    weights_MTE: Tensor
    left_out: tuple[str, ...] = ()

    @property
    def experts(self) -> list[str]:
        """The experts' labels, in the recipe's order."""
        return [expert.label for expert in self.plan.experts]

    @cached_property
    def means_TE(self) -> Tensor:
        """Every token's weights, mean over the modules."""
        return self.weights_MTE.mean(0)

    @cached_property
    def layers(self) -> list[LayerSummary]:
        """The trace by layer, in their order."""
        return summed_up([module.layer for module in self.modules], self.weights_MTE)

    def summary(self) -> dict[str, Any]:
        """What was traced, and the trace by layer, as plain values."""
        return {
            "composition": self.plan.digest,
            "base": self.plan.base.name,
            "methods": [unit.recipe.method.method for unit in _routed(self.plan)],
            "experts": [{"label": e.label, "digest": e.digest} for e in self.plan.experts],
            "layers": [_rounded(layer.record()) for layer in self.layers],
            "entropy_unit": "bits",
        }

    def record(self) -> dict[str, Any]:
        """The trace as plain values, for `--json`; weights as `[module][token][expert]`."""
        return {
            **self.summary(),
            "tokens": [token.record() for token in self.tokens],
            "modules": [
                {"name": m.name, "layer": m.layer, "experts": list(m.experts)} for m in self.modules
            ],
            "left_out": list(self.left_out),
            "weights": _rounded(self.weights_MTE.tolist()),
        }


def trace(
    composition: Composition,
    prompts: Sequence[str],
    *,
    modules: str | None = None,
    new_tokens: int = 0,
    chat: bool = False,
    tasks: Sequence[str] | None = None,
    session: Session | None = None,
) -> Trace:
    """Let a routed model read prompts, and record which experts each token chose.

    Args:
        composition: A composed model with a route.
        prompts: The prompts, which are read one by one. An encoder reads at most 256 tokens of each,
            as for a score.
        modules: A regular expression that must match a whole module path. The default is all routed
            modules.
        new_tokens: The largest number of tokens that the model writes after each prompt, by greedy
            decoding, and then reads. A token that ends the text is never read.
        chat: Put the prompts into the tokenizer's chat template.
        tasks: The task of each prompt, for a router by task.
        session: The progress callback. The default is `Session()`.

    Returns:
        The weights of the experts, by module and token.

    Raises:
        UsageError: The composition is a merge, the base does not read text alone, a prompt is empty
            or too long, or no module matches.
    """
    report = (session or Session()).report
    plan, model = composition.plan, composition.model
    wanted = check_traceable(plan, modules)
    if new_tokens:
        check_generates(composition)
    tokenizer = load_tokenizer(plan.base)
    tokens: list[Token] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for number, prompt in enumerate(prompts):
        report("reading prompts", number, len(prompts))
        text = in_chat(composition, tokenizer, prompt) if chat else prompt
        ids = _ids(tokenizer, plan.base, text, number)
        _check_length(len(ids) + new_tokens, number, model, plan.base)
        if not plan.base.causal and len(ids) == MAX_TOKENS:
            report(f"note: of prompt {number + 1}, {MAX_TOKENS} tokens are read at most", 0, 0)
        named = composition.tasks(tasks[number]) if tasks else nullcontext()
        with named, record_routing(model, len(plan.experts), set(wanted).__contains__) as found:
            new = _read(composition, tokenizer, ids, new_tokens)
        for name, calls in found.items():
            parts[name] += calls
        tokens += pieces(tokenizer, ids, new, number)
    return _put_together(composition, tokens, parts)


def check_traceable(plan: Plan, modules: str | None = None) -> list[str]:
    """The routed modules that a pattern matches, all by default.

    Raises UsageError for a merge, for a base that does not read text alone, and for no such module.
    """
    base, routed = plan.base, _routed(plan)
    if not routed:
        merges = " and ".join(method.method for method in plan.recipe.methods)
        raise UsageError(
            f"{merges}: a merge routes nothing", "name a recipe with route: in the place of merge:"
        )
    classifier = base.architecture.endswith("ForSequenceClassification")
    config = read_json(base.folder / "config.json")
    seen = {"vision_config", "image_size", "is_encoder_decoder"} & {
        k for k, v in config.items() if v
    }
    if seen or not (base.causal or base.encoder or classifier):
        raise UsageError(
            f"{base.name} is a {base.architecture}, which does not read text alone, token by token",
            "trace a causal language model, a text encoder or a text classifier",
        )
    return _matched([n.removesuffix(".weight") for u in routed for n in u.parameters], modules)


def _routed(plan: Plan) -> list[Plan]:
    """The plan itself, or its parts, where they are routes."""
    return [unit for unit in plan.units if unit.recipe.route is not None]


def _matched(routed: list[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return routed
    try:
        expression = re.compile(check_pattern(pattern))
        with limit_matching_time():
            found = [name for name in routed if expression.fullmatch(name)]
    except (ValueError, TimeoutError) as error:
        raise UsageError(f"--module: {error}", "write a simpler one") from None
    if not found:
        raise UsageError(
            f"no routed module is called {pattern!r}",
            f"the pattern must match a whole path, such as {routed[0]}",
        )
    return found


def task_prompts(base: Base, reference: str, limit: int) -> list[str]:
    """What a base reads of the first examples of a task, of all of its splits."""
    task = read_task(reference)
    examples = task.split("all", limit)
    return [task.prompt(e) if base.causal else e.input for e in examples]


def _ids(tokenizer: Any, base: Base, text: str, number: int) -> list[int]:
    cut = {} if base.causal else {"truncation": True, "max_length": MAX_TOKENS}
    ids: list[int] = tokenizer(text, **cut)["input_ids"]
    if not ids:
        raise UsageError(f"prompt {number + 1} is empty", "write some text after --prompt")
    return ids


def _check_length(count: int, number: int, model: Any, base: Base) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and count > longest:
        raise UsageError(
            f"prompt {number + 1} has {count} tokens with those to be written, {base.name} reads {longest}",
            "shorten it",
        )


@torch.no_grad()
def _read(composition: Composition, tokenizer: Any, ids: list[int], new_tokens: int) -> list[int]:
    """Let the model read a text, and write; returns what it wrote and read."""
    if new_tokens:
        return generate_ids(composition, tokenizer, ids, new_tokens + 1)[:-1]  # the last is unread
    ids_1T = torch.tensor([ids], device=composition.model.device)
    composition.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))
    return []


def _put_together(composition: Composition, tokens: list[Token], parts: dict[str, list[Tensor]]) -> Trace:
    model = composition.model
    weights = {name: torch.cat(own) for name, own in parts.items() if own}
    whole = {name: w_TE for name, w_TE in weights.items() if len(w_TE) == len(tokens)}
    if not whole:
        raise UsageError(
            f"no routed module reads every token once: {', '.join(list(parts)[:3])}",
            "trace a recipe that routes others",
        )
    modules = [Traced(name, layer_of(name), model.get_submodule(name).experts) for name in whole]
    left_out = tuple(name for name in parts if name not in whole)
    return Trace(composition.plan, tuple(tokens), tuple(modules), torch.stack(list(whole.values())), left_out)


def _rounded(value: Any) -> Any:
    """Plain values with their numbers rounded to six digits after the point."""
    if isinstance(value, dict):
        return {name: _rounded(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return round(value, 6) if isinstance(value, float) else value
