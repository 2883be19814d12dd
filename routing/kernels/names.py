"""The names of the kernels, in recipes and in records."""

from __future__ import annotations

from typing import Literal, get_args

Kernel = Literal["all", "gather", "sampled", "prefilter"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

# Kernels that need float32 on a CPU.
FLOAT32_CPU_KERNELS: tuple[Kernel, ...] = ("sampled", "prefilter")

# Earlier names, which recipes may still use. Digests, locks and measurements always use them, so
# that renaming a kernel does not change them.
RENAMED_KERNELS: dict[str, Kernel] = {"copied": "gather", "screened": "prefilter"}
_RECORDED: dict[str, str] = {new: old for old, new in RENAMED_KERNELS.items()}


def parse_kernel(name: str) -> Kernel:
    """Parse the name of a kernel in a recipe or a record.

    Args:
        name: The present or an earlier name of a kernel.

    Returns:
        The kernel's present name.

    Raises:
        ValueError: No kernel has or had that name.
    """
    for kernel in KERNELS:
        if name in (kernel, _RECORDED.get(kernel)):
            return kernel
    raise ValueError(f"expected a kernel among {', '.join(KERNELS)}, found {name!r}")


def find_recorded_name(name: str) -> str:
    """Find the name that digests, locks and measurements use for a kernel.

    Args:
        name: The present or an earlier name of a kernel, or `auto`.

    Returns:
        The kernel's earliest name.
    """
    return _RECORDED.get(name, name)
