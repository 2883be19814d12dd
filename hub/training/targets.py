"""The modules that a LoRA is trained on: all linear ones, or those that a pattern selects."""

from __future__ import annotations

import re
from dataclasses import dataclass

from experthub.hub.bases.base import Base
from experthub.hub.bases.names import ModelNames
from experthub.hub.errors import UsageError
from experthub.hub.files.patterns import check_pattern, limit_matching_time

ALL_LINEAR = "all-linear"
NAMES = re.compile(r"\s*[\w.]+\s*(,\s*[\w.]+\s*)*")
# Kinds of models whose fused kernels read the weight of `out_proj` without calling the module. PEFT
# refuses LoRAs on it.
STATE_SPACE = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


@dataclass(frozen=True)
class Targets:
    """The values of peft's configuration that select layers.

    Attributes:
        modules: A value of `target_modules`.
        parameters: A value of `target_parameters`: the stacks of matrices of fused experts.
        excluded: A value of `exclude_modules`.
    """

    modules: str | list[str]
    parameters: list[str]
    excluded: list[str]


def choose_targets(text: str, base: Base, model_type: str, frozen: list[str]) -> Targets:
    """Choose the modules that get a LoRA.

    Args:
        text: `all-linear`, names of modules with commas between them, or a regular expression that
            matches whole paths of modules. Names and expressions may also select the parameters of
            fused experts.
        base: The base.
        model_type: The `model_type` of its configuration.
        frozen: The modules that no expert changes.

    Returns:
        The targets.

    Raises:
        UsageError: The text is not a regular expression, or a name in it selects no layer.
    """
    names, never = base.names, set(frozen)
    if model_type in STATE_SPACE:
        never |= {n for n in names.linear if n.endswith((".out_proj", ".conv1d"))}
    if text == ALL_LINEAR:
        return Targets(text, [], sorted(never))
    linear, stacks = set(names.linear) - never, _list_stacks(names)
    words = [word.strip() for word in text.split(",")] if NAMES.fullmatch(text) else [text]
    try:
        with limit_matching_time():
            found = {word: _match(word, [*linear, *stacks]) for word in words}
    except (ValueError, TimeoutError) as error:
        raise UsageError(f"--targets {text!r}: {error}", "simplify the pattern") from None
    for word in words:  # A misspelt name must not leave its layers untrained without a word.
        if not found[word]:
            leaves = sorted({n.rpartition(".")[2] for n in [*linear, *stacks]})
            raise UsageError(
                f"--targets {word!r} matches no linear module of {base.name} that can be trained",
                f"name some of {', '.join(leaves)}, or use --targets {ALL_LINEAR}",
            )
    chosen = set().union(*found.values())
    return Targets(sorted(chosen & linear), sorted(chosen - linear), [])


def _match(word: str, names: list[str]) -> set[str]:
    """Return the names that a name of modules or a regular expression matches."""
    pattern = re.compile(_make_pattern(word))
    return {name for name in names if pattern.fullmatch(name)}


def _list_stacks(names: ModelNames) -> list[str]:
    """List the parameters that hold a matrix for each expert of a mixture."""
    return [n for n, shape in names.shapes.items() if len(shape) == 3 and ".experts." in n]


def _make_pattern(text: str) -> str:
    """Return the regular expression for one name, or for the expression, of `--targets`."""
    if not NAMES.fullmatch(text):
        return check_pattern(text)
    return rf"(.*\.)?{re.escape(text)}"
