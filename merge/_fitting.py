"""Learning of the coefficients of task vectors: one training loop for all learned merges.

Shapes: E experts, B blocks, K groups of entries, N inputs of a task, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from experthub.merge._attached_experts import AttachedExperts
from experthub.merge._catalogue import MethodFailure
from experthub.merge._coefficients import Coefficients, assign_blocks, make_generator
from experthub.merge._fit_settings import LABELLED, Fit
from experthub.merge._materials import Data, MergeMaterials, Progress
from experthub.merge._objectives import (
    choose_trusted,
    cross_entropy,
    entropy,
    fixmatch,
    marginal_entropy,
)
from experthub.merge._task_vector import TaskVector
from torch import Tensor, nn

SAVE_EVERY = 20  # The number of steps between two saves of the run's state.


def learn_coefficients(materials: MergeMaterials, fit: Fit) -> Coefficients:
    """Find the coefficients that minimise an objective.

    Args:
        materials: The task vectors, the data, and functions that load and save the state of a run.
        fit: The objective and the settings of the optimiser.

    Returns:
        The coefficients, with the loss of every step.

    Raises:
        ValueError: Data or labels are missing, or a task has fewer than two choices.
        MethodFailure: The loss is not finite.
    """
    start = make_start_coefficients(materials.vectors, fit)
    data = materials.given_data
    if not data.tasks or not all(data.sizes):
        raise ValueError("expected inputs of at least one task, found none")
    if fit.objective in LABELLED and data.labels is None:
        raise ValueError(f"expected labels for the objective {fit.objective}, found none")
    with AttachedExperts(data.model, materials.vectors, start, halves=fit.halves) as attached:
        return _Run(attached, materials, data, fit, start).learn()


def make_start_coefficients(vectors: Sequence[TaskVector], fit: Fit) -> Coefficients:
    """Create the coefficients before the first step.

    Args:
        vectors: The task vectors of E experts.
        fit: The settings; `start` is the value of every coefficient.

    Returns:
        Coefficients `[E, B]`, or `[E, B, K]` for more than one group, in double precision.
    """
    names = sorted({name for vector in vectors for name in vector}, key=_split_numbers)
    blocks = tuple(dict.fromkeys(assign_blocks(names, fit.granularity).values()))
    shape = (len(vectors), len(blocks)) + ((fit.groups,) if fit.groups > 1 else ())
    values = torch.full(shape, fit.start, dtype=torch.float64)
    return Coefficients(values, blocks, fit.granularity, fit.combine, fit.seed)


def _split_numbers(name: str) -> list[tuple[int, str]]:
    """Make a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def choose_rows(size: int, batch_size: int, step: int, *key: object) -> Tensor:
    """Choose the inputs of a step: none repeats before the random order is drawn anew.

    Args:
        size: The number of inputs N.
        batch_size: Inputs per step; all N if there are fewer.
        step: The step, from 0.
        *key: Values that determine the random order, such as a seed and a task.

    Returns:
        The numbers of the inputs.
    """
    batches = max(1, size // batch_size)
    order = torch.randperm(size, generator=make_generator("rows", step // batches, *key))
    at = step % batches * batch_size
    return order[at : at + batch_size]


@dataclass
class _Run:
    """A training run: the settings, and the state that changes at every step."""

    attached: AttachedExperts
    materials: MergeMaterials
    data: Data
    fit: Fit
    start: Coefficients
    history: list[float] = field(default_factory=list)
    best: Tensor | None = None
    best_loss: float = math.inf
    waited: int = 0

    def __post_init__(self) -> None:
        fit = self.fit
        self.values = nn.Parameter(self.start.values.clone())
        kind = torch.optim.AdamW if fit.l2 else torch.optim.Adam
        self.optimiser = kind([self.values], lr=fit.lr, weight_decay=fit.l2)
        self.held_out = self.data.held_out if fit.patience else None
        self.look_every = max(1, fit.steps // 20)
        self._trusted = self._choose_trusted() if fit.objective == "fixmatch" else []
        self._floor = 0.0
        if self.held_out is not None and fit.objective == "negation":
            self._floor = fit.keep * self._evaluate(self.held_out, torch.zeros_like(self.values))[1]
            # Coefficients of zero forget nothing, and are the answer if no others reach the floor.
            self.best = torch.zeros_like(self.values)
        self._restore(self.materials.load())

    def learn(self) -> Coefficients:
        """Run the remaining steps, and return the coefficients."""
        while len(self.history) < self.fit.steps and not self._stopped:
            self._step(len(self.history))
        chosen = self.values.detach() if self.best is None else self.best
        return Coefficients(
            self._clamp(chosen),
            self.start.blocks,
            self.start.granularity,
            self.start.combine,
            self.start.seed,
            tuple(self.history),
        )

    @property
    def _stopped(self) -> bool:
        """True if the held-out loss has not improved for `patience` evaluations."""
        return self.held_out is not None and self.waited >= self.fit.patience

    def _step(self, step: int) -> None:
        """Take one step of the optimiser; evaluate, save and report when it is time."""
        fit = self.fit
        if fit.cosine:
            rate = fit.lr * 0.5 * (1 + math.cos(math.pi * step / fit.steps))
            self.optimiser.param_groups[0]["lr"] = rate
        self.attached.set(self._clamp(self.values.detach()))
        loss = self._compute_loss(self.data, step)
        value = float(loss.detach()) / len(self.data.sizes)
        if not math.isfinite(value):
            raise MethodFailure(f"the loss is {value} at step {step + 1}", "set a lower lr")
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        gradient = self.attached.gradient()
        if fit.constraint == "clamp":
            low, high = fit.bounds
            gradient = gradient * ((self.values >= low) & (self.values <= high))
        self.values.grad = gradient + fit.l1 * self.values.detach().sign() / self.values.numel()
        self.optimiser.step()
        if fit.constraint == "project":
            with torch.no_grad():
                self.values.clamp_(*fit.bounds)
        self.history.append(value)
        done = len(self.history)
        if self.held_out is not None and (done % self.look_every == 0 or done == fit.steps):
            self._keep_best(self.held_out)
        if done % SAVE_EVERY == 0 or done == fit.steps:
            self.materials.save(self._collect_state())
        self.materials.report(f"learning coefficients, loss {value:.4f}", done, fit.steps)

    def _clamp(self, values: Tensor) -> Tensor:
        """Clamp coefficients to the bounds if the constraint is `clamp`."""
        return values.clamp(*self.fit.bounds) if self.fit.constraint == "clamp" else values

    def _compute_loss(self, data: Data, step: int) -> Tensor:
        """Compute the objective on a step's inputs, summed over the tasks."""
        fit = self.fit
        sizes = enumerate(data.sizes)
        rows = [choose_rows(size, fit.batch_size, step, fit.seed, task) for task, size in sizes]
        if fit.objective == "marginal_entropy":
            views = [data.logits(rows, 1 + step * fit.views + v) for v in range(fit.views)]
            losses = [marginal_entropy(torch.stack(found)) for found in zip(*views, strict=True)]
        elif fit.objective == "fixmatch":
            with torch.no_grad():
                weak = data.logits(rows)
            strong = data.logits(rows, 1 + step)
            losses = [
                fixmatch(w, s, sure[r], label[r], fit.confidence)
                for w, s, r, (sure, label) in zip(weak, strong, rows, self._trusted, strict=True)
            ]
        else:
            losses = self._compute_losses(data, rows)
        return torch.stack(losses).sum()

    def _compute_losses(self, data: Data, rows: Sequence[Tensor]) -> list[Tensor]:
        """Compute the loss of each task, for an objective that reads each input once."""
        logits = data.logits(rows)
        if min(found.shape[-1] for found in logits) < 2:
            raise ValueError("expected tasks with two choices or more, found one with fewer")
        if self.fit.objective == "entropy" or data.labels is None:
            return [entropy(found) for found in logits]
        given = zip(logits, rows, data.labels, strict=True)
        losses = [cross_entropy(found, labels[r]) for found, r, labels in given]
        return [-loss if task in self.fit.forget else loss for task, loss in enumerate(losses)]

    @torch.no_grad()
    def _choose_trusted(self) -> list[tuple[Tensor, Tensor]]:
        """Choose the inputs that the base predicts most confidently, per task, and pseudo-labels."""
        self.attached.set(torch.zeros_like(self.start.values))
        return [choose_trusted(found) for found in self._compute_all_logits(self.data)]

    def _keep_best(self, data: Data) -> None:
        """Evaluate the coefficients on held-out inputs, and keep them if they are the best so far."""
        loss, kept = self._evaluate(data, self.values.detach())
        self.waited += 1
        if loss < self.best_loss and kept >= self._floor:
            self.best_loss, self.waited = loss, 0
            self.best = self.values.detach().clone()

    @torch.no_grad()
    def _evaluate(self, data: Data, values: Tensor) -> tuple[float, float]:
        """Compute the mean loss over tasks, and the mean accuracy over tasks not to be forgotten.

        If there are tasks to forget, the loss is the negative cross-entropy of these tasks only.
        """
        self.attached.set(self._clamp(values))
        losses, right = [], []
        pairs = zip(self._compute_all_logits(data), data.labels or (), strict=True)
        for task, (logits, labels) in enumerate(pairs):
            loss = float(cross_entropy(logits, labels))
            if task in self.fit.forget:
                losses.append(-loss)
                continue
            right.append(float((logits.argmax(-1) == labels).float().mean()))
            if not self.fit.forget:
                losses.append(loss)
        return sum(losses) / len(losses), sum(right) / max(len(right), 1)

    def _compute_all_logits(self, data: Data) -> list[Tensor]:
        """Compute the logits `[N, C]` of all inputs of each task, one batch at a time."""
        size, width = max(data.sizes), self.fit.batch_size
        parts = [
            data.logits([torch.arange(min(s, n), min(s + width, n)) for n in data.sizes])
            for s in range(0, size, width)
        ]
        return [
            torch.cat([p[task] for p in parts if len(p[task])]) for task in range(len(data.sizes))
        ]

    def _collect_state(self) -> dict[str, Tensor]:
        """Collect the tensors from which `_restore` can resume the run."""
        moments = self.optimiser.state[self.values]
        best = {} if self.best is None else {"best": self.best}
        return best | {
            "values": self.values.detach().clone(),
            "exp_avg": moments["exp_avg"].clone(),
            "exp_avg_sq": moments["exp_avg_sq"].clone(),
            "history": torch.tensor(self.history, dtype=torch.float64),
            "looks": torch.tensor([self.best_loss, self.waited], dtype=torch.float64),
        }

    def _restore(self, state: Progress | None) -> None:
        """Resume from a saved state; the result has the same bits as without an interruption."""
        if state is None:
            return
        with torch.no_grad():
            self.values.copy_(state["values"])
        self.history = state["history"].tolist()
        self.optimiser.state[self.values] = {
            "step": torch.tensor(float(len(self.history))),
            "exp_avg": state["exp_avg"].clone(),
            "exp_avg_sq": state["exp_avg_sq"].clone(),
        }
        self.best = state.get("best")
        self.best_loss, self.waited = state["looks"][0].item(), int(state["looks"][1])
