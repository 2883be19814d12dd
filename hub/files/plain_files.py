"""Opening files that somebody else may have replaced by a link, a pipe or a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from experthub.hub.errors import IntegrityError


def open_plain(path: Path, mode: str = "rb", follow: bool = False) -> Any:
    """Open a plain file, and nothing else.

    Opening a pipe could block forever. A symbolic link that another user put into a folder of the
    hub could lead to any file of this user.

    Args:
        path: The file.
        mode: The mode, as for `open`; a new file gets its permissions by the umask.
        follow: Follow a symbolic link. Never set it for a file that is written.

    Returns:
        The open file, of the type that `open` returns for the mode.

    Raises:
        IntegrityError: The path is a symbolic link, a pipe, a device or a folder.
    """

    def open_handle(name: str, flags: int) -> int:
        stay = 0 if follow else os.O_NOFOLLOW
        handle = os.open(name, flags | stay | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.ENXIO, "not a file")
        return handle

    try:
        return open(path, mode, opener=open_handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        what = "is a symbolic link" if path.is_symlink() and not follow else "is not a file"
        raise IntegrityError(f"{path} {what}", f"remove {path}, and try again") from None
