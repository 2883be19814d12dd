"""Run one composition of many experts in its own process.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _answers import answer
from _bench import BASE, timed
from experthub.hub import Plan, Recipe, Registry, Session, Store, compose, resolve
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.composition.bank import Bank
from experthub.routing import RoutedLinear
from torch import Tensor


def private_bytes() -> int:
    """Return the bytes of this process's memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Side:
    """The base, and a composition of the first experts of a registry.

    Args:
        folder: The folder of the store.
        registry: The file of the registry.
        count: The number of experts.
        method: The `route:` of the recipe, as JSON.
    """

    def __init__(self, folder: Path, registry: Path, count: int, method: str) -> None:
        self.session = Session(Registry.read(registry), Store(folder))
        experts = [f"expert-{number}" for number in range(count)]
        route = json.loads(method)
        self.recipe = {"base": BASE, "experts": experts, "dtype": "float32", "route": route}
        self.base_of = find(BASE, self.session)
        self.models: dict[str, Any] = {}
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def plan(self) -> Plan:
        """Resolve the recipe."""
        return resolve(Recipe.of(self.recipe), session=self.session)

    def composed(self) -> Any:
        """Compose the recipe, and return the model."""
        return compose(self.recipe, session=self.session).model

    def base(self) -> Any:
        """Load the base."""
        return load_model(self.base_of, "float32", "cpu")

    def do_pack(self) -> dict[str, float]:
        """Rebuild the bank, and return the seconds and the bytes that it takes."""
        place = Bank.of(self.plan()).experts.parent
        shutil.rmtree(place, ignore_errors=True)
        seconds = timed(self.composed)()
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        return {"seconds": seconds, "bytes": size}

    def do_load(self, what: str) -> float:
        """Time loading.

        Args:
            what: `base`, `routed` for the composition, or `resolve`.

        Returns:
            The time in seconds.
        """
        calls: dict[str, Callable[[], Any]] = {
            "base": self.base,
            "routed": self.composed,
            "resolve": self.plan,
        }
        return timed(calls[what])()

    def do_keep(self, *ids: str) -> dict[str, int]:
        """Load the base and the composition, and keep them for the following commands.

        Args:
            *ids: The token ids of the input.

        Returns:
            The private bytes that each of them takes.
        """
        self.ids = torch.tensor([[int(token) for token in ids]])
        self.base()  # imports must not count
        found = {}
        for name, load in (("base", self.base), ("routed", self.composed)):
            before = private_bytes()
            self.models[name] = load()
            found[name] = private_bytes() - before
        return found

    def do_forward(self, name: str) -> float:
        """Time one forward pass.

        Args:
            name: `base` or `routed`.

        Returns:
            The time in seconds.
        """
        model = self.models[name]
        return timed(lambda: model(input_ids=self.ids, use_cache=False).logits)()

    def do_decode(self, name: str, steps: str) -> float:
        """Time decoding one token after the input, with a cache.

        Args:
            name: `base` or `routed`.
            steps: The number of tokens.

        Returns:
            The median time of a token in seconds.
        """
        model = self.models[name]
        out = model(input_ids=self.ids, use_cache=True)
        times = []
        for _ in range(int(steps)):
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            start = time.perf_counter()
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def do_versions(self) -> dict[str, str]:
        """Return the versions of the packages."""
        return {"torch": torch.__version__}

    def do_kernels(self) -> list[str]:
        """Return the kernels that were the fastest, for few tokens and for many."""
        groups = [m.group for m in self.models["routed"].modules() if isinstance(m, RoutedLinear)]
        return sorted({f"{group.kernels.few}, {group.kernels.many}" for group in groups})

    def do_touched(self) -> float:
        """Return the share of experts that some token of the input chose, averaged over modules."""
        shares: list[float] = []

        def look(module: Any, inputs: tuple[Tensor]) -> None:
            weights = module.compute_weights(inputs[0])
            shares.append(float((weights.flatten(0, -2) > 0).any(0).float().mean()))

        model = self.models["routed"]
        modules = [m for m in model.modules() if isinstance(m, RoutedLinear)]
        hooks = [module.register_forward_pre_hook(look) for module in modules]
        model(input_ids=self.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return sum(shares) / len(shares)


@torch.no_grad()
def main() -> None:
    """Answer commands until stdin ends."""
    threads, folder, registry, count, method = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = Side(Path(folder), Path(registry), int(count), method)
    answer(side)


if __name__ == "__main__":
    main()
