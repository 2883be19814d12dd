"""The catalogue of routers, and the properties that only routers have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from experthub.merge import Catalogue, Combine, Options
from experthub.routing._router import ExpertStack


@dataclass(frozen=True)
class Routing:
    """A description of what a router reads and returns, as in https://arxiv.org/abs/2408.07057.

    Args:
        input: The unit that gets weights of its own: each `token`, each `example`, each `task`, or
            `nothing` (all inputs get the same weights).
        depth: The level of the decision. `module` decides at every module, by a function of its
            `ExpertStack`; `model` decides once, by a function of the `Pool`.
        sparse: Whether an expert may get no weight at all, so that it is not computed.
        combines: The ways of mixing that the router is defined for; the first one is the default.
        zero_shot: Whether the router serves tasks that it has not seen.
    """

    input: Literal["token", "example", "task", "nothing"] = "token"
    depth: Literal["module", "model"] = "module"
    sparse: bool = False
    combines: tuple[Combine, ...] = ("outputs", "parameters")
    zero_shot: bool = True

    def __str__(self) -> str:
        of = "all inputs" if self.input == "nothing" else f"each {self.input}"
        by = "at every module" if self.depth == "module" else "once for the model"
        many = "some" if self.sparse else "all"
        unseen = "" if self.zero_shot else "; serves only tasks that it has seen"
        ways = " or ".join(self.combines)
        return f"weights for {of}, {by}, of {many} experts; combines {ways}{unseen}"


@dataclass(frozen=True)
class RouterTraits:
    """The properties of a router that its caller and the conformance suite must know.

    Args:
        routing: A description of what the router reads and returns.
        adapt: A function `adapt(stack, options)` that changes the experts of a module before they
            are routed.
    """

    routing: Routing = Routing()
    adapt: Callable[[ExpertStack, Options], ExpertStack] | None = None


routers = Catalogue("route", "experthub.routers", RouterTraits, ("method", "combine", "kernel"))
