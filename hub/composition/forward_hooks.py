"""Forward hooks that tell the routers of a composed model which rows it reads.

Only routers that choose for whole examples, or by more than a module's input, need them. What a
router decides for a row is computed when the first tokens of the row are read. It then stays with
the row in the key/value cache, where rows may be selected, repeated or reordered.

Shapes: B rows, S tokens, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import torch
from experthub.hub.composition.prompt_length import GenerateByPrompt, select_prompt
from experthub.hub.composition.row_cache import RowCache, find_row_cache
from experthub.hub.errors import UsageError
from experthub.routing import Context, ForwardPass, ForwardPasses, Select
from torch import Tensor, nn

INPUTS = ("input_ids", "inputs_embeds", "pixel_values")  # The arguments that hold what is read.


@dataclass(frozen=True)
class _Rows:
    """The rows of one forward pass, which implement `experthub.routing.Batch`.

    Args:
        ids: The inputs `[B, S]`.
        real: A mask `[B, S]` of the tokens that are not padding.
        find_tasks: A function that returns the tasks of the rows, or one for all; None if the caller
            named none.
        read_texts: A function that decodes `ids` and `real` into texts.
        read_hidden: A function that computes the base's last hidden states.
    """

    ids: Tensor
    real: Tensor
    find_tasks: Callable[[], tuple[str, ...] | None]
    read_texts: Callable[[Tensor, Tensor], list[str]] | None
    read_hidden: Callable[[], Tensor]

    @property
    def texts(self) -> list[str]:
        """The text of each row."""
        if self.read_texts is None:
            raise UsageError(
                "the router reads texts, which it was not registered for",
                "add needs=('texts',) to its routers.register(...)",
            )
        if self.ids.is_floating_point():
            raise UsageError(
                "the router reads texts, and the model got embeddings", "pass input_ids"
            )
        return self.read_texts(self.ids, self.real)

    @property
    def tasks(self) -> list[str]:
        """The task of each row; an empty text if the caller named none."""
        rows, named = len(self.ids), self.find_tasks()
        if named is None:
            return [""] * rows
        if len(named) not in (1, rows):
            raise UsageError(
                f"{len(named)} tasks were named for a batch of {rows} rows",
                "name one task for each row, or one for all rows",
            )
        return list(named) * (rows if len(named) == 1 else 1)

    @property
    def hidden(self) -> Tensor:
        """The last hidden states `[B, S, H]` of the base alone."""
        return self.read_hidden()

    def place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of the rows."""
        return tensor.to(self.ids.device)


@dataclass
class RouteHook:
    """One route of a composed model, as the model's forward hooks see it.

    Args:
        context: The link from the routed modules to the forward pass.
        select: A router that decides for the whole model; None if all decide at their modules.
        by_token: Whether `select` returns weights for every token of every forward pass. Otherwise
            it returns weights for rows, once, when their first tokens are read.
        read_texts: A function that decodes token ids `[B, S]` and a mask of real tokens into texts.
    """

    context: Context
    select: Select | None = None
    by_token: bool = False
    read_texts: Callable[[Tensor, Tensor], list[str]] | None = None


# The tasks of the rows, by the model that they were named for. A model is shared by threads, so they
# are kept by thread and by asyncio task.
_named: ContextVar[Mapping[str, tuple[str, ...]]] = ContextVar(
    "named tasks", default=MappingProxyType({})
)


@dataclass
class Watch:
    """The forward hooks of one composed model.

    Nothing about the rows of a forward pass is stored here, because threads share the model.

    Args:
        passes: The forward passes of the model.
        hooked: The routes that need hooks.
        name: The name under which tasks are named; copies of the model share it.
    """

    passes: ForwardPasses = field(default_factory=ForwardPasses)
    hooked: list[RouteHook] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid4().hex)
    _handles: list[Any] = field(default_factory=list)

    def attach(self, model: Any, route: RouteHook) -> None:
        """Hook a transformers model, at its base model, which every model with a head calls.

        Args:
            model: The composed model.
            route: One route of the model.
        """
        self.hooked.append(route)
        self.passes.announced = True
        inner: nn.Module = model.base_model
        if hasattr(type(model), "generate"):
            model.generate = GenerateByPrompt(model)
        self._handles = self._handles or [
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
        before = _named.get().get(self.name)
        _named.set({**_named.get(), self.name: (names,) if isinstance(names, str) else (*names,)})
        try:
            yield
        finally:
            others = {key: own for key, own in _named.get().items() if key != self.name}
            _named.set(others if before is None else {**others, self.name: before})

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a forward pass: find out which rows are read, and let routers decide for them."""
        now = self.passes.find()
        if now is not None and now.off and now.rows is None:
            now.rows = 0  # `_read_hidden` began this one, and makes no decision about its rows.
            return
        now = self.passes.begin()
        _refuse_checkpoints(module)
        kept = find_row_cache(kwargs.get("past_key_values"))
        named = (kwargs[name] for name in INPUTS if kwargs.get(name) is not None)
        given = args[0] if args else next(named, None)
        if given is None:
            raise UsageError(
                "the model was called without inputs", f"pass one of {', '.join(INPUTS)}"
            )
        now.rows = len(given)
        now.tokens = given.shape[1] if given.ndim in (2, 3) else 0
        whole = _find_real_tokens(kwargs.get("attention_mask"), now.tokens)
        now.real = select_prompt(whole, now.rows, now.tokens, given.device)
        now.kept = dict(kept.rows) if kept else {}
        decided = {route for route, _ in now.kept}
        for hook in self.hooked:
            if hook.select is None or (hook.context.route in decided and not hook.by_token):
                continue
            real = whole if hook.by_token else now.real
            if real is None:
                real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
            rows = _Rows(
                given,
                real,
                lambda: _named.get().get(self.name),
                hook.read_texts,
                lambda: self._read_hidden(now, module, args, kwargs, kept),
            )
            hook.context.select(hook.select(rows))

    def _read_hidden(
        self, now: ForwardPass, module: nn.Module, args: Any, kwargs: Any, kept: RowCache | None
    ) -> Tensor:
        """Compute the base's last hidden states `[B, S, H]` of the tokens that are read now."""
        own = {k: v for k, v in kwargs.items() if not k.startswith("output_")}
        own["past_key_values"] = kept.base if kept else None
        plain = self.passes.begin()
        plain.off = True
        try:
            with torch.no_grad():
                read = module(*args, **own)
        finally:
            self.passes.end(plain)
        now.base = getattr(read, "past_key_values", None)
        hidden: Tensor = read.last_hidden_state
        return hidden

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """End a forward pass: store what is known about the rows in the key/value cache."""
        now = self.passes.find()
        if now is None or now.off:
            return
        self.passes.end(now)
        cache = getattr(output, "past_key_values", None)
        kept = find_row_cache(cache)
        if kept is None and cache is not None and cache.layers:
            kept = RowCache(is_sliding=bool(getattr(cache.layers[0], "is_sliding", False)))
            cache.layers.append(kept)
        if kept is not None:
            passing = {hook.context.route for hook in self.hooked if hook.by_token}
            kept.rows = {
                key: own
                for key, own in now.kept.items()
                if key[0] not in passing and own.ndim > 1  # `[E]` holds for all rows alike.
            }
            kept.base = now.base


def _refuse_checkpoints(module: Any) -> None:
    """Refuse gradient checkpointing, which calls modules again when the forward pass has ended."""
    if not (module.training and torch.is_grad_enabled()):
        return
    if any(getattr(one, "gradient_checkpointing", False) for one in module.modules()):
        raise UsageError(
            "a router that decides for whole rows cannot be used with gradient checkpointing",
            "call model.gradient_checkpointing_disable()",
        )


def _find_real_tokens(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return the mask of the tokens that are read now, from the mask of all tokens so far."""
    if mask is None or mask.ndim != 2 or not tokens:
        return None
    return mask[:, -tokens:].bool()
