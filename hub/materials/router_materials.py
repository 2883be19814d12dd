"""The materials from which a router prepares its state, read from a plan and its data.

Shapes: N examples, C choices, T tokens, I inputs of a module, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.composition.assembly import assemble
from experthub.hub.errors import UsageError
from experthub.hub.materials.sentence_encoder import SentenceEncoder
from experthub.hub.materials.task_data import TaskData, prepare_rows
from experthub.hub.readers.batching import read_all
from experthub.hub.readers.features import format_text, watch_inputs
from experthub.hub.readers.reader import Reader
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.recipes.examples import choose_examples
from experthub.hub.recipes.method import Method
from experthub.hub.recipes.plan import Plan
from experthub.hub.session import Session
from experthub.hub.tasks.task import Chosen
from experthub.merge import concatenate
from experthub.routing import RoutedLinear, State, uniform
from torch import Tensor


class PlanMaterials:
    """The materials of a plan's router, which implement `experthub.routing.RouterMaterials`.

    Models are loaded and composed when they are first asked for.

    Args:
        plan: A plan with one route.
        session: The store, the registry, the device and the progress callback.

    Raises:
        UsageError: The recipe has no data.
    """

    def __init__(self, plan: Plan, session: Session) -> None:
        if plan.data is None:
            raise UsageError(
                f"{plan.recipe.method.method} prepares a state from data that it does not ask for",
                'register it with needs=("data",) or needs=("texts",)',
            )
        self.plan, self.session = plan, session
        self.given = choose_examples(plan.data.use)
        self.labels = [expert.label for expert in plan.experts]
        self.n_layers = len(plan.layers)
        self.report = session.report
        self._labelled = plan.recipe.method.strategy.needs_labels(plan.recipe.method.options)

    @property
    def n_features(self) -> int:
        """The width H of the base's hidden states."""
        width: int = self._model.config.get_text_config().hidden_size
        return width

    @cached_property
    def _model(self) -> Any:
        """The base in float32."""
        return load_model(self.plan.base, "float32", self.session.device)

    @cached_property
    def _reader(self) -> Reader:
        """The reader of the base."""
        session = self.session
        return reader_for(
            self.plan.base,
            session.device,
            lambda: self._model,
            report=session.report,
            virtual_tokens=self.plan.virtual_tokens,
        )

    def place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of the model.

        Args:
            tensor: Any tensor.

        Returns:
            The tensor on that device.
        """
        return tensor.to(self._model.device)

    def load_embedder(self, name: str) -> SentenceEncoder:
        """Load a sentence encoder.

        Args:
            name: The name of a base.

        Returns:
            The encoder.

        Raises:
            UsageError: The base is not a sentence encoder.
        """
        return SentenceEncoder.load(self.plan.encoders.get(name) or find(name, self.session))

    def read_texts(self, expert: int) -> list[str]:
        """Return the texts of examples of an expert's own tasks.

        Args:
            expert: The position of the expert in the recipe.

        Returns:
            The prompts for a causal language model, and the inputs for another base.
        """
        causal, own = self.plan.base.is_causal, self._select_own_tasks(expert)
        return [format_text(one.task, e, causal) for one in own for e in one.examples]

    @torch.no_grad()
    def read_activations(self, expert: int, see: Callable[[str, Tensor], None]) -> None:
        """Run one expert alone on examples of its own tasks, and pass on its modules' inputs.

        Args:
            expert: The position of the expert in the recipe.
            see: A function that is called with the path of a routed module and its inputs `[T, I]`,
                without padding, for every batch.
        """
        model = self._compose_alone(expert)
        routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
        with watch_inputs(routed, self._reader, see):
            for one in self._select_own_tasks(expert):
                self._read(model, one)

    @torch.no_grad()
    def read_logits(self, expert: int) -> list[Tensor]:
        """Compute the logits of one expert alone on the recipe's data.

        Args:
            expert: The position of the expert in the recipe.

        Returns:
            Logits `[N, C]` for each task.
        """
        model = self._compose_alone(expert)
        return [self._read(model, one) for one in self.given]

    def read_answers(self) -> list[Tensor]:
        """Return the right choices of the recipe's data.

        Returns:
            Positions among the choices `[N]` for each task.

        Raises:
            UsageError: The router is not registered as one that needs labels.
        """
        if not self._labelled:
            raise UsageError(
                f"{self.plan.recipe.method.method} reads labels that it does not ask for",
                "register it with needs_labels=",
            )
        return [torch.tensor(one.labels) for one in self.given]

    def compose(self, state: Mapping[str, Tensor]) -> TaskData:
        """Compose the recipe with the given tensors as the router's state.

        Args:
            state: Tensors by name, on the model's device; gradients flow to them.

        Returns:
            The recipe's data, read by the composed model. It has labels if the router is registered
            as one that needs them.
        """
        plan = replace(self.plan, dtype="float32")
        composed = assemble(plan, self.session, State(state), model=self._model)
        return TaskData(composed.model, self._reader, self.given, self._labelled)

    def _select_own_tasks(self, expert: int) -> Sequence[Chosen]:
        """Return the examples of the tasks that an expert was trained on."""
        tasks = {member.task for member in self.plan.experts[expert].members}
        return [one for one in self.given if one.task.reference in tasks]

    def _compose_alone(self, expert: int) -> Any:
        """Compose the model of one expert alone, with the weight 1."""
        planned = self.plan.experts[expert]
        route = Method(kind="route", method=uniform.__name__)
        update: dict[str, Any] = {"route": route, "data": None, "router": None}
        if self.plan.virtual_tokens:
            merge = Method(kind="merge", method=concatenate.__name__)
            update |= {"route": None, "merge": merge}
        alone = replace(
            self.plan,
            recipe=self.plan.recipe.model_copy(update=update),
            experts=(replace(planned, weight=1.0),),
            parameters=tuple(n for n in self.plan.parameters if n in planned.changes),
            dtype="float32",
            data=None,
            found=None,
        )
        return assemble(alone, self.session, model=self._model).model

    def _read(self, model: Any, one: Chosen) -> Tensor:
        """Compute the logits `[N, C]` of a task's examples."""
        return read_all(self._reader, model, *prepare_rows(self._reader, one))
