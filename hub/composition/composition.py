"""A composed model beside the plan that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experthub.hub.composition.export import save_model
from experthub.hub.composition.forward_hooks import Watch
from experthub.hub.composition.model_state import ModelState
from experthub.hub.composition.routes import Routes
from experthub.hub.composition.saving import allow_saving, refuse_save
from experthub.hub.composition.soft_prompts import AttachedPrompts, save_prompts
from experthub.hub.errors import UsageError
from experthub.hub.recipes.plan import Plan
from experthub.merge import TaskVector


@dataclass
class Composition:
    """A composed model beside the plan that it was made from.

    Args:
        model: A transformers model, frozen, in eval mode.
        plan: The plan that it was made from.
        merged: The task vector that was added to the base; None for a routed model.
        state: The state of the method: the coefficients of a learned merge, a router's tensors, or
            None for a method without state.
    """

    model: Any
    plan: Plan
    merged: TaskVector | None = None
    state: Any = None
    _routes: tuple[Routes | AttachedPrompts, ...] = ()
    _watch: Watch = field(default_factory=Watch)
    _before: ModelState | None = None

    @property
    def lock(self) -> dict[str, Any]:
        """The lock: everything that the model is made from, pinned by digest."""
        return self.plan.lock

    def detach(self) -> Any:
        """Put the original modules of a routed model back, bit for bit.

        No other thread may run the model at that time.

        Returns:
            The model, which is the base again.

        Raises:
            UsageError: The recipe has a merge, which has changed the weights.
        """
        changed = not self.plan.virtual_tokens
        if changed and any(unit.recipe.route is None for unit in self.plan.units):
            raise UsageError(
                "the weights of a merge have changed and cannot be restored",
                "load the base instead",
            )
        for routes in self._routes:
            routes.undo(self.model)
        if self._before is not None:
            self._before.restore(self.model)
        allow_saving(self.model)
        return self.model

    @contextmanager
    def tasks(self, names: Sequence[str] | str) -> Iterator[None]:
        """Set the task of each row of the batches in the block, for a router that chooses by task.

        The tasks hold for the thread and the asyncio task of the block. A thread that is started in
        the block does not see them; `asyncio.to_thread` passes them on. They also hold for copies of
        the model.

        Args:
            names: One name for each row, or one for all rows. A name is the label of an expert in
                the recipe, or the task that an expert was trained on.

        Example:
            >>> with composition.tasks("bigbench:implicatures"):  # doctest: +SKIP
            ...     composition.model.generate(**batch)
        """
        with self._watch.name_tasks(names):
            yield

    def save(self, folder: Path | str, format: Literal["hf", "peft"] = "hf") -> Path:
        """Write a merged model as a folder that transformers loads, or as one PEFT adapter.

        Args:
            folder: A new or empty folder.
            format: `hf` writes the whole model with its tokenizer. `peft` writes the exact merged
                LoRA, whose rank is the sum of the experts' ranks.

        Returns:
            The folder.

        Raises:
            UsageError: The model is routed, or the format is `peft` and the merge is not low-rank.
            ConflictError: The folder is in use.

        Example:
            >>> composition.save("merged", format="peft")  # doctest: +SKIP
        """
        if self.plan.virtual_tokens:
            (attached,) = self._routes
            merged = attached.merged if isinstance(attached, AttachedPrompts) else None
            return save_prompts(merged, self.plan, Path(folder), format)
        if self.merged is None:
            refuse_save()
        return save_model(self.model, self.plan, self.merged, Path(folder), format)
