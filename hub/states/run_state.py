"""The folder of a method's run, and the progress that survives an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import hub_home, open_atomically
from experthub.hub.recipes.plan import Plan
from experthub.hub.states.state_format import format_of
from torch import Tensor

PROGRESS = "state.safetensors"


def run_folder(plan: Plan) -> Path:
    """Return the folder of a plan's method: the progress of a run and the state that it made.

    Args:
        plan: A plan of one method. Equal compositions share one folder.

    Returns:
        The folder, whether it exists or not.
    """
    return hub_home() / "runs" / f"{format_of(plan).kind}-{plan.digest[7:23]}"


def state_folder(plan: Plan) -> Path:
    """Return the folder of the state that a plan's method has made.

    Args:
        plan: A plan of one method.

    Returns:
        The folder, which exists once the state was made.
    """
    return run_folder(plan) / "found"


def load_progress(plan: Plan) -> dict[str, Tensor] | None:
    """Load the progress that an interrupted run saved.

    Args:
        plan: A plan of one method.

    Returns:
        Tensors by name; None if no run was interrupted.

    Raises:
        IntegrityError: The file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = run_folder(plan) / PROGRESS
    if not path.is_file():
        return None
    try:
        found: dict[str, Tensor] = load(path.read_bytes())
        return found
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}", "remove it to start the run again"
        ) from None


def save_progress(plan: Plan, progress: Mapping[str, Tensor]) -> None:
    """Save the progress from which the next run continues.

    Args:
        plan: A plan of one method.
        progress: Tensors by name.
    """
    from safetensors.torch import save

    with open_atomically(run_folder(plan) / PROGRESS) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in progress.items()}))
