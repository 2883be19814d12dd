"""The form in which a difference is stored, and its error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from experthub.hub.errors import HubError, UsageError
from experthub.hub.finetunes.two_models import ParameterValues
from torch import Tensor

MAX_SHARD_SIZE = 5_000_000_000  # Bytes.


@dataclass(frozen=True)
class Form:
    """The form of a stored difference: dense, or one of the three smaller forms.

    Args:
        rank: Store a LoRA of this rank, at least 1.
        energy: Store a LoRA. Each module gets the smallest rank that keeps this share, above 0 and
            at most 1, of the sum of its squared singular values.
        sparse: Keep this share, above 0 and at most 1, of each tensor's entries: those of the
            largest magnitude.
        dtype: The dtype of the stored tensors: `float32`, `bfloat16` or `float16`.
        max_shard_size: The largest number of bytes of tensors in one file of a task vector. A
            larger tensor has a file of its own; a LoRA always has one file.

    Raises:
        UsageError: A value is out of its range, or two of `rank`, `energy` and `sparse` are set.
    """

    rank: int | None = None
    energy: float | None = None
    sparse: float | None = None
    dtype: str = "float32"
    max_shard_size: int = MAX_SHARD_SIZE

    def __post_init__(self) -> None:
        given = [f"--{k}" for k in ("rank", "energy", "sparse") if getattr(self, k) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", "use only one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank is {self.rank}", "set a rank of at least 1")
        for name, share in (("energy", self.energy), ("sparse", self.sparse)):
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"--{name} is {share}", "set a share above 0 and at most 1")
        if self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size is {self.max_shard_size}", "set a size such as 5GB")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"--dtype is {self.dtype!r}", "use float32, bfloat16 or float16")

    @property
    def low_rank(self) -> bool:
        """True if the difference is stored as a LoRA."""
        return self.rank is not None or self.energy is not None

    def record(self) -> dict[str, Any]:
        """Return the settings that are stored with the expert, without the size of files.

        Returns:
            The settings by name.
        """
        chosen = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: value for key, value in chosen.items() if key != "max_shard_size"}


def check_kept(name: str, delta: Tensor, stored: Tensor, form: Form) -> None:
    """Refuse a change that is too small for the dtype in which it is stored.

    Args:
        name: The parameter.
        delta: Its change.
        stored: The change as it is stored.
        form: The form, which has the dtype.

    Raises:
        HubError: The stored change is zero, and the change is not.
    """
    if bool(delta.any()) and not bool(stored.any()):
        largest = float(delta.abs().max())
        raise HubError(
            f"the change of {name}, at most {largest:.3g}, is zero in {form.dtype}",
            f"use --dtype {'bfloat16' if form.dtype == 'float16' else 'float32'}",
        )


@dataclass
class ApproximationError:
    """The error of a stored difference, accumulated parameter by parameter.

    Attributes:
        total: The squared norm of the true difference.
        missed: The squared norm of the error.
        missed_left_out: The part of `missed` that is due to parameters that are left out.
        worst: The stored parameter with the largest relative error, and this error.
        left_out: The parameters that the form cannot hold.
        deviation: The largest entry of |base + stored - fine-tuned|, in float32.
    """

    total: float = 0.0
    missed: float = 0.0
    missed_left_out: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    left_out: list[str] = field(default_factory=list)
    deviation: float = 0.0

    def add(self, name: str, read: ParameterValues, stored: Tensor | None) -> None:
        """Add the error of one parameter.

        Args:
            name: The parameter.
            read: Its values in both models and their difference.
            stored: The stored change, or None if the parameter is left out.
        """
        size = float(read.delta.double().square().sum())
        rest = -read.delta if stored is None else stored.to(read.delta.dtype) - read.delta
        missed = float(rest.double().square().sum())
        self.total += size
        self.missed += missed
        if stored is None:
            self.left_out.append(name)
            self.missed_left_out += missed
            there = read.base
        else:
            relative = (missed / size) ** 0.5 if size else 0.0
            self.worst = max(self.worst, (name, relative), key=lambda pair: pair[1])
            there = read.base.float() + stored.float()
        self.deviation = max(self.deviation, float((there - read.tuned).abs().max()))

    def record(self) -> dict[str, Any]:
        """Summarise the errors, rounded to four significant digits.

        Returns:
            The relative error and the largest deviation. The worst parameter, and the number and
            the share of the squared error of those that are left out, are added if there are any.
        """
        figures: dict[str, Any] = {
            "relative_error": _round((self.missed / self.total) ** 0.5 if self.total else 0.0),
            "largest_deviation": _round(self.deviation),
        }
        if self.worst[1]:
            parameter, relative = self.worst
            figures["worst"] = {"parameter": parameter, "relative_error": _round(relative)}
        if self.left_out:
            share = self.missed_left_out / self.missed if self.missed else 0.0
            figures["left_out"] = {
                "parameters": len(self.left_out),
                "share_of_squared_error": _round(share),
            }
        return figures


def _round(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")
