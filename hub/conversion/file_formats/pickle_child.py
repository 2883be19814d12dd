"""The process that reads a pickle of torch and writes its tensors as safetensors.

It is started by path, with `python -I -P`, and imports nothing of this package. `torch.load` runs
with `weights_only=True`, which builds tensors and plain values only. If that fails to hold, the
process has no network, no rights to write elsewhere, and limits of memory, time and files, as far
as the platform supports each.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
import sys
from pathlib import Path
from typing import Any

NEW_USER, NEW_NET = 0x10000000, 0x40000000
SPARE = 1 << 30  # Bytes of memory beside those of the tensors.
WRITES = 0x1FF2  # Landlock: writing, and creating or removing anything, but not reading.
BUILD, RULE, ENFORCE, NO_NEW_PRIVILEGES = 444, 445, 446, 38
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.")


def leave_network() -> None:
    """Enter a network namespace without devices, if the system allows it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NET)


def allow_writes_in(folder: str) -> None:
    """Let the process write below one folder only, if the kernel has Landlock."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    rules = ctypes.create_string_buffer(struct.pack("Q", WRITES))
    handle = libc.syscall(BUILD, rules, 8, 0)
    if handle < 0:
        return
    place = os.open(folder, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", WRITES, place))
    libc.syscall(RULE, handle, 1, rule, 0)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.syscall(ENFORCE, handle, 0)


def limit_resources(size: int) -> None:
    """Limit memory, processor time, and the size and number of files.

    Args:
        size: The size of the pickle in bytes.
    """
    used = 0
    if sys.platform == "linux":
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        used = int(pages) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, used + 4 * size + SPARE),
        (resource.RLIMIT_CPU, 120 + size // (10 << 20)),
        (resource.RLIMIT_FSIZE, 4 * size + SPARE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def refuse_event(event: str, arguments: Any) -> None:
    """Stop a call that reading tensors never makes; this function is an audit hook."""
    if event.startswith(REFUSED):
        raise PermissionError(f"a pickle may not call {event}")


def find_tensors(value: Any, tensor: Any) -> dict[str, Any]:
    """Return the tensors of a state dict, which may stand under a usual key."""
    for key in ("state_dict", "module", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not tensors by name")
    found = {str(k): v for k, v in value.items() if isinstance(v, tensor)}
    if len(found) != len(value):
        other = next(k for k, v in value.items() if not isinstance(v, tensor))
        raise ValueError(f"{str(other)[:80]!r} is not a tensor")
    return found


def show_reason(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Write an error as one line, which the parent shows.

    Args:
        kind: The class of the error.
        error: The error.
        trace: Its traceback, which nobody needs.
    """
    reason = f"{kind.__name__}: {' '.join(str(error).split())[:300]}"
    if kind.__name__ == "UnpicklingError":  # torch's own text explains how to run the code.
        named = re.search(r"GLOBAL (\S{1,200})", str(error))
        reason = f"it calls {named[1]}" if named else "it is not a file of tensors"
    sys.stderr.write(reason)


def main(source: str, target: str) -> None:
    """Read the pickle, and write its tensors.

    Args:
        source: The path of the pickle.
        target: The path of the new safetensors file.
    """
    leave_network()
    import torch
    from safetensors.torch import save_file

    size = Path(source).stat().st_size
    allow_writes_in(str(Path(target).parent))
    limit_resources(size)
    sys.addaudithook(refuse_event)
    found = find_tensors(torch.load(source, map_location="cpu", weights_only=True), torch.Tensor)
    total = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    if total > 4 * size + (1 << 20):
        raise ValueError(f"its tensors would need {total} bytes, and the file has {size}")
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, target)


if __name__ == "__main__":
    sys.excepthook = show_reason
    main(*sys.argv[1:3])
