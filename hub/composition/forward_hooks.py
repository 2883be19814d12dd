"""Forward hooks that tell the routers of a composed model which rows it reads.

Only routers that choose for whole examples, or by more than a module's input, need them. What a
router decides for a row is computed when the first tokens of the row are read. It then stays with
the row in the key/value cache, where rows may be selected, repeated or reordered.

Shapes: B rows, S tokens, H hidden features.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from experthub.hub.composition.prompt_length import select_prompt
from experthub.hub.composition.real_tokens import find_real_tokens
from experthub.hub.composition.row_cache import (
    CACHES,
    RowCache,
    find_cache,
    find_returned_cache,
    find_row_cache,
)
from experthub.hub.composition.rows import RouteHook, Rows, named_tasks
from experthub.hub.composition.whole_prompts import read_whole_prompts
from experthub.hub.errors import UsageError
from experthub.routing import VALUES, ForwardPass, ForwardPasses
from torch import Tensor, nn

# The arguments that hold what is read.
INPUTS = ("input_ids", "inputs_embeds", "pixel_values")


@dataclass
class Watch:
    """The forward hooks of one composed model.

    Nothing about the rows of a forward pass is stored here, because threads share the model.

    Args:
        passes: The forward passes of the model.
        hooked: The routes that need hooks.
        name: The name under which tasks are named; copies of the model share it.
        arguments: The names of the arguments of each hooked module, in order, by its class.
    """

    passes: ForwardPasses = field(default_factory=ForwardPasses)
    hooked: list[RouteHook] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid4().hex)
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def attach(self, model: Any, route: RouteHook) -> None:
        """Hook a transformers model, at the modules that a model with a head may call.

        Args:
            model: The composed model.
            route: One route of the model.
        """
        self.hooked.append(route)
        self.passes.announced = True
        read_whole_prompts(model)
        if self._handles:
            return
        for inner in list_entries(model):
            self.arguments[type(inner).__name__] = tuple(
                inspect.signature(inner.forward).parameters
            )
            self._handles += [
                inner.register_forward_pre_hook(self._before, with_kwargs=True),
                inner.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def name_tasks(self, names: Sequence[str] | str) -> Iterator[None]:
        """Name the tasks of the rows that this thread's forward passes in the block read.

        Args:
            names: One name for each row, or one for all rows.
        """
        before = named_tasks.get().get(self.name)
        named_tasks.set(
            {**named_tasks.get(), self.name: (names,) if isinstance(names, str) else (*names,)}
        )
        try:
            yield
        finally:
            others = {key: own for key, own in named_tasks.get().items() if key != self.name}
            named_tasks.set(others if before is None else {**others, self.name: before})

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a forward pass: find out which rows are read, and let routers decide for them."""
        outer = self.passes.find()
        if outer is not None and outer.module is not module:
            return  # A module around this one began the forward pass.
        if outer is not None and outer.off and outer.rows is None:
            outer.rows = 0  # `_read_hidden` began this one, and makes no decision about its rows.
            return
        now = self.passes.begin(module)
        _refuse_checkpoints(module)
        names = self.arguments[type(module).__name__] if args else ()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = find_cache(given)
        kept = find_row_cache(cache)
        read = next((given[name] for name in INPUTS if given.get(name) is not None), None)
        if read is None:
            raise UsageError(
                "the model was called without inputs", f"pass one of {', '.join(INPUTS)}"
            )
        now.rows = len(read)
        now.tokens = read.shape[1] if read.ndim in (2, 3) else 0
        now.kept = dict(kept.rows) if kept else {}
        now.past = dict(kept.past) if kept else {}
        decided = {route for route, _ in now.kept}
        new = [hook for hook in self.hooked if hook.by_token or hook.context.route not in decided]
        whole = None
        if now.tokens and any(not hook.by_token for hook in new):
            mask, positions = given.get("attention_mask"), given.get("position_ids")
            whole = find_real_tokens(mask, positions, cache, now.rows, now.tokens)
            now.real = select_prompt(whole, now.rows, now.tokens, read.device)
        for hook in new:
            if hook.select is None:
                continue
            real = whole if hook.by_token else now.real
            if real is None:
                real = torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)
            rows = Rows(
                read,
                real,
                self.name,
                hook.read_texts,
                lambda: self._read_hidden(now, module, args, kwargs, kept),
            )
            hook.context.select(hook.choose(rows))

    def _read_hidden(
        self, now: ForwardPass, module: nn.Module, args: Any, kwargs: Any, kept: RowCache | None
    ) -> Tensor:
        """Compute the base's last hidden states `[B, S, H]` of the tokens that are read now."""
        own = {k: v for k, v in kwargs.items() if not k.startswith("output_")}
        holder = next((name for name in CACHES if name in own), CACHES[0])
        own[holder] = kept.base if kept else None
        plain = self.passes.begin(module)
        plain.off = True
        try:
            with torch.no_grad():
                read = module(*args, **own)
        finally:
            self.passes.end(plain)
        now.base = find_cache(read)
        hidden: Tensor = read.last_hidden_state
        return hidden

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """End a forward pass: store what is known about the rows in the key/value cache."""
        now = self.passes.find()
        if now is None or now.off or now.module is not module:
            return
        self.passes.end(now)
        if output is None:  # The forward pass raised an error.
            return
        cache = find_returned_cache(output)
        kept = find_row_cache(cache)
        if kept is None and cache is not None and cache.layers:
            kept = RowCache(bool(getattr(cache.layers[0], "is_sliding", False)))
            cache.layers.append(kept)
        if kept is not None:
            passing = {hook.context.route for hook in self.hooked if hook.by_token}
            kept.rows = {
                key: own
                for key, own in now.kept.items()
                if key[0] not in passing and own.ndim > 1  # `[E]` holds for all rows alike.
            }
            for route in passing:
                kept.past[route] = (*now.past.get(route, ()), now.kept[route, VALUES])
            kept.base = now.base


def list_entries(model: Any) -> list[nn.Module]:
    """List the modules whose call may be the forward pass of a model without its head.

    Most models with a head call their base model. Others, such as `OPTForCausalLM`, call the only
    part of it that reads inputs.

    Args:
        model: A transformers model.

    Returns:
        The base model, and the parts inside each other that alone read its inputs.
    """
    found: list[nn.Module] = []
    inside: list[nn.Module] = [model.base_model]
    while len(inside) == 1:
        found += inside
        inside = [part for part in found[-1].children() if _has_layers(part)]
    return found


def _has_layers(module: nn.Module) -> bool:
    """Tell whether a module reads the inputs of a model and has lists of layers."""
    reads = not inspect.signature(module.forward).parameters.keys().isdisjoint(INPUTS)
    return reads and any(isinstance(part, nn.ModuleList) for part in module.modules())


def _refuse_checkpoints(module: Any) -> None:
    """Refuse gradient checkpointing, which calls modules again when the forward pass has ended."""
    if not (module.training and torch.is_grad_enabled()):
        return
    if any(getattr(one, "gradient_checkpointing", False) for one in module.modules()):
        raise UsageError(
            "a router that decides for whole rows cannot be used with gradient checkpointing",
            "call model.gradient_checkpointing_disable()",
        )
