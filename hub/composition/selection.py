"""Routers that decide once for the whole model, in a form that can be moved, copied and pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import explain_errors
from experthub.hub.materials.sentence_encoder import SentenceEncoder
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.merge import Options
from experthub.routing import Batch, Pool, Select, State, StateTensors, Weights, routers
from torch import Tensor


@dataclass(eq=False)
class EncoderLoader:
    """A function that loads the sentence encoders of a router, each of them once.

    Args:
        bases: The encoders that the plan names.
        session: The registry that knows other encoders.
        fingerprint: The fingerprint of the encoder that made the router's index, if there is one.
        loaded: The encoders that were loaded, by name.
    """

    bases: Mapping[str, Base]
    session: Session
    fingerprint: str | None
    loaded: dict[str, SentenceEncoder] = field(default_factory=dict)

    def __call__(self, name: str) -> SentenceEncoder:
        """Return the encoder of a name."""
        if name not in self.loaded:
            encoder = SentenceEncoder.load(self.bases.get(name) or find(name, self.session))
            encoder.check(self.fingerprint)
            self.loaded[name] = encoder
        return self.loaded[name]

    def __reduce__(self) -> Any:
        # A session belongs to a process, and its progress callback cannot be pickled.
        return _restore_loader, (self.bases, self.fingerprint, self.loaded)


def _restore_loader(
    bases: Mapping[str, Base], fingerprint: str | None, loaded: dict[str, SentenceEncoder]
) -> EncoderLoader:
    """Restore a pickled loader."""
    return EncoderLoader(bases, Session(), fingerprint, loaded)


@dataclass(eq=False)
class Selection:
    """A `Select` function that makes the router of a method on the device of the rows.

    A router is a closure, which cannot be pickled; it is made again from these values instead.

    Args:
        method: The name of the method.
        options: Its options.
        pool: The experts and the state of the router.
    """

    method: str
    options: Options
    pool: Pool
    _made: dict[torch.device, Select] = field(default_factory=dict)
    _nothing: Tensor = field(default_factory=lambda: torch.empty(0))

    def prepare(self, device: torch.device) -> Select:
        """Return the router for one device; make it if it was not made yet.

        Args:
            device: The device of the state's tensors.

        Returns:
            The function of the method.
        """
        if device not in self._made:
            state = {name: tensor.to(device) for name, tensor in self.pool.state.items()}
            pool = replace(self.pool, state=StateTensors(state))
            self._made[device] = routers[self.method].call(pool, **self.options)
        return self._made[device]

    def __call__(self, batch: Batch) -> Weights:
        """Return the weights of the rows."""
        with explain_errors(self.method):
            weights = self.prepare(batch.place(self._nothing).device)(batch)
        experts = None if weights.experts is None else batch.place(weights.experts)
        return Weights(batch.place(weights.values), experts)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}


@dataclass(frozen=True, eq=False)
class TextReader:
    """A function that decodes token ids.

    Args:
        tokenizer: The tokenizer of the base.
    """

    tokenizer: Any

    def __call__(self, ids_BS: Tensor, real_BS: Tensor) -> list[str]:
        """Decode token ids `[B, S]` where a mask of real tokens is true."""
        pairs = zip(ids_BS.tolist(), real_BS.tolist(), strict=True)
        rows = [[i for i, real in zip(row, kept, strict=True) if real] for row, kept in pairs]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts


def make_selection(model: Any, plan: Plan, state: State, session: Session) -> Selection | None:
    """Make the router if it decides once for the whole model.

    Args:
        model: The composed model.
        plan: A plan with one route.
        state: The state of the router.
        session: The registry for an embedder, and the progress callback.

    Returns:
        The router; None for a router that decides at every module.
    """
    method = plan.recipe.method
    if method.strategy.traits.routing.depth == "module":
        return None
    pool = Pool(
        tuple(expert.label for expert in plan.experts),
        tuple(tuple(m.task for m in e.members if m.task) for e in plan.experts),
        dict(state.tensors),
        EncoderLoader(plan.encoders, session, state.embedder),
        len(plan.layers),
    )
    made = Selection(method.method, method.options, pool)
    made.prepare(model.device)
    return made
