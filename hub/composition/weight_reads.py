"""Routing of linear modules whose weight their owner reads, instead of calling the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import local
from typing import Any, cast

import torch
from experthub.hub.errors import UsageError
from experthub.merge import WeightRead
from experthub.routing import RoutedLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Attributes and methods of a weight that do not depend on its entries.
METADATA = frozenset(
    {"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size"}
)
VIEWS = frozenset({"T", "mT", "H", "mH", "data"})
CASTS = frozenset({"to", "type", "type_as", "float", "double"})


class _ReadWeights(TorchFunctionMode):
    """A mode in which a product with a routed weight is one with the base and its experts.

    Args:
        linears: The routed modules by path. Their owner runs in the mode.
    """

    def __init__(self, linears: Mapping[str, RoutedLinear]) -> None:
        super().__init__()
        self.linears = linears
        self._thread = local()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy gets: no calls that run."""
        return {"linears": self.linears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.linears, self._thread = state["linears"], local()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Enter the mode, before the forward pass of the owner."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leave the mode, after the forward pass of the owner."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def pause(self, module: nn.Module, args: Any) -> None:
        """Let a routed module use its weight, before the module itself is called."""
        self._thread.calls = getattr(self._thread, "calls", 0) + 1

    def resume(self, module: nn.Module, args: Any, output: Any) -> None:
        """Undo `pause`."""
        self._thread.calls -= 1

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; add the experts if it multiplies with a routed weight."""
        kwargs = kwargs or {}
        found = None if getattr(self._thread, "calls", 0) else self._find(args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        path, linear = found
        name = str(getattr(func, "__name__", func))
        if name == "__get__":
            name = str(getattr(getattr(func, "__self__", None), "__name__", ""))
            if name not in VIEWS:
                return func(*args, **kwargs)
        elif name in METADATA:
            return func(*args, **kwargs)
        elif name in CASTS and args[0] is linear.weight:
            cast_weight = func(*args, **kwargs)
            cast_weight._routed = found  # The result stands for the weight.
            return cast_weight
        elif func is F.linear:
            return _multiply(linear, args[0], func(*args, **kwargs))
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and _is(args[0], linear):
            y = func(*args, **kwargs).transpose(-1, -2)
            return _multiply(linear, args[1].transpose(-1, -2), y).transpose(-1, -2)
        elif func is F.multi_head_attention_forward:
            return _attend(linear, args, kwargs)
        raise UsageError(
            f"{path} cannot be routed: {name}() reads its weight, without a call of the module",
            "leave it out with targets:, or use merge: instead of route:",
        )

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, RoutedLinear] | None:
        """Find the routed module whose weight is among the arguments of a function."""
        for value in _flatten(args, kwargs):
            known: tuple[str, RoutedLinear] | None = getattr(value, "_routed", None)
            if known is not None:
                return known
            for path, linear in self.linears.items():
                if value is linear._parameters["weight"]:
                    return path, linear
        return None


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """List the tensors among the arguments of a function."""
    for value in (*args, *kwargs.values()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor):
                yield one


def _is(value: Any, linear: RoutedLinear) -> bool:
    """Return whether a value is the weight of a routed module, or a cast of it."""
    return value is linear.weight or hasattr(value, "_routed")


def _multiply(linear: RoutedLinear, x: Tensor, y: Tensor) -> Tensor:
    """Add the experts of a module to a product with its weight."""
    own = linear.get_parameter("weight").dtype
    if x.dtype == own:
        return cast(Tensor, linear(x, y.contiguous()))
    added: Tensor = linear(x.to(own), torch.zeros_like(y, dtype=own))
    return y + added.to(y.dtype)


def _attend(linear: RoutedLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call attention without its last product, which the routed module then computes."""
    place = next(i for i, value in enumerate(args) if value is linear.weight)
    eye = torch.eye(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
    without = (*args[:place], eye, None, *args[place + 2 :])  # The bias follows the weight.
    attended, weights = F.multi_head_attention_forward(*without, **kwargs)
    # Attention puts tokens before rows. Routers expect rows first.
    if attended.ndim == 3:
        return linear(attended.transpose(0, 1)).transpose(0, 1), weights
    return linear(attended), weights


@dataclass
class WeightReads:
    """The hooks that route modules whose weight is read.

    Args:
        handles: The handles of the hooks.
    """

    handles: list[Any] = field(default_factory=list)

    @classmethod
    def attach(cls, model: nn.Module, reads: Mapping[str, WeightRead]) -> WeightReads:
        """Hook the owners of routed modules that may read their weights.

        Args:
            model: The composed model.
            reads: Path of a routed module -> how its weight is read.

        Returns:
            The hooks.
        """
        found = cls()
        owned: dict[str, dict[str, RoutedLinear]] = {}
        for path, read in reads.items():
            linear = cast(RoutedLinear, model.get_submodule(path))
            owned.setdefault(read.owner, {})[path] = linear
        for owner, linears in owned.items():
            mode = _ReadWeights(linears)
            found._hook(model.get_submodule(owner), mode.enter, mode.leave)
            for linear in linears.values():
                found._hook(linear, mode.pause, mode.resume)
        return found

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        """Call functions before and after each forward pass of a module."""
        self.handles.append(module.register_forward_pre_hook(before))
        self.handles.append(module.register_forward_hook(after, always_call=True))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
