"""The folder of a method's run, and the progress that survives an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import hub_home, open_atomically
from experthub.hub.recipes.plan import Plan
from experthub.hub.states.state_format import format_of
from torch import Tensor

PROGRESS, FOUND = "state.safetensors", "found"


def run_folder(plan: Plan) -> Path:
    """Return the folder of a plan's method: the progress of a run and the state that it made.

    Args:
        plan: A plan of one method. Equal compositions share one folder.

    Returns:
        The folder, whether it exists or not.
    """
    return _locate_run(plan, plan.digest)


def state_folder(plan: Plan) -> Path:
    """Return the folder of the state that a plan's method has made.

    Args:
        plan: A plan of one method.

    Returns:
        The folder, which exists once the state was made.
    """
    own, earlier = run_folder(plan), _locate_run(plan, plan.weights_digest)
    found = earlier if (earlier / FOUND).is_dir() and not (own / FOUND).is_dir() else own
    return found / FOUND


def covers_weights_only(plan: Plan, folder: Path) -> bool:
    """Tell whether a state was kept under the digest of version 1, which covers only weights.

    Args:
        plan: A plan of one method.
        folder: The folder that `state_folder` returned.

    Returns:
        True if the configuration of the base may have been another when the state was made.
    """
    return folder.parent != run_folder(plan)


def _locate_run(plan: Plan, digest: str) -> Path:
    """Return the folder of a run by the digest of its composition."""
    return hub_home() / "runs" / f"{format_of(plan).kind}-{digest[7:23]}"


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
