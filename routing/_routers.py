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
        input: What has weights of its own: each `token`, each `example`, each `task`, or `nothing`
            (every input gets the same weights).
        depth: Who decides: every `module` by itself, by a function of its `ExpertStack`; or the
            `model` once, by a function of the `Pool`.
        sparse: Whether experts may get no weight at all, which saves their work.
        combines: The ways of mixing that the router is defined for, the default first.
        zero_shot: Whether the router serves tasks of which it has seen nothing.
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
    """Properties of a router that whoever runs it, and the conformance suite, must know.

    Args:
        routing: What the router looks at and gives.
        adapt: Changes the experts of a module before they are routed, `adapt(stack, options)`.
    """

    routing: Routing = Routing()
    adapt: Callable[[ExpertStack, Options], ExpertStack] | None = None


routers = Catalogue("route", "experthub.routers", RouterTraits)
