"""How a difference is stored, and how far what is stored is from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from experthub.hub.errors import UsageError
from experthub.hub.finetunes.two_models import Read
from torch import Tensor

MAX_SHARD_SIZE = 5_000_000_000  # bytes


@dataclass(frozen=True)
class Form:
    """How a difference is stored: dense, or at most one of the three smaller ways.

    rank: a LoRA of this rank, at least 1.  energy: a LoRA, of each module the smallest rank whose
    squared singular values hold this share of their sum, above 0 and at most 1.  sparse: of each
    tensor the share of entries of largest magnitude, above 0 and at most 1.  dtype: `float32`,
    `bfloat16` or `float16`.  max_shard_size: bytes of tensors in a task vector's file, if a tensor
    is not larger; a LoRA has one file.  Raises UsageError for anything else.
    """

    rank: int | None = None
    energy: float | None = None
    sparse: float | None = None
    dtype: str = "float32"
    max_shard_size: int = MAX_SHARD_SIZE

    def __post_init__(self) -> None:
        given = [f"--{k}" for k in ("rank", "energy", "sparse") if getattr(self, k) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", "choose one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank is {self.rank}", "a rank is at least 1")
        for name, share in (("energy", self.energy), ("sparse", self.sparse)):
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"--{name} is {share}", "a share is above 0 and at most 1")
        if self.max_shard_size < 1:
            raise UsageError("--max-shard-size is 0", "write a size, such as 5GB")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"--dtype is {self.dtype!r}", "use float32, bfloat16 or float16")

    @property
    def low_rank(self) -> bool:
        return self.rank is not None or self.energy is not None

    def record(self) -> dict[str, Any]:
        """What a training's description says of it: the number of files is no part of it."""
        chosen = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: value for key, value in chosen.items() if key != "max_shard_size"}


@dataclass
class Error:
    """How far what is stored is from the true difference, summed parameter by parameter.

    worst: of the parameters that are stored the one with the largest relative error, and that.
    left_out: parameters that the form cannot hold.  deviation: the largest entry of
    base + stored - fine-tuned, in float32.
    """

    total: float = 0.0
    missed: float = 0.0
    missed_left_out: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    left_out: list[str] = field(default_factory=list)
    deviation: float = 0.0

    def add(self, name: str, read: Read, stored: Tensor | None) -> None:
        """Count one parameter; None for one that is left out."""
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
        """The figures; of what is left out its number and its share of the squared error."""
        figures: dict[str, Any] = {
            "relative_error": _short((self.missed / self.total) ** 0.5 if self.total else 0.0),
            "largest_deviation": _short(self.deviation),
        }
        if self.worst[1]:
            parameter, relative = self.worst
            figures["worst"] = {"parameter": parameter, "relative_error": _short(relative)}
        if self.left_out:
            share = self.missed_left_out / self.missed if self.missed else 0.0
            figures["left_out"] = {
                "parameters": len(self.left_out),
                "share_of_squared_error": _short(share),
            }
        return figures


def _short(value: float) -> float:
    return float(f"{value:.4g}")
