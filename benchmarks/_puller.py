"""One pull of a repository, by `hub pull` or by `snapshot_download`; run by `_peer.Peer`.

Reads one command a line from stdin, and answers each with one line of JSON on stdout.  What either
side needs is imported before the first answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

IMPORTS = ["certifi", "httpcore", "httpx", "numpy", "yaml"]
IMPORTS += [f"experthub.hub.{name}" for name in ("base_sources", "describe", "pull", "remotes.hf")]


def hub() -> Callable[[str], None]:
    """The command, in this process."""
    for name in IMPORTS:
        import_module(name)
    from experthub.cli.main import app

    def pull(what: str) -> None:
        with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
            try:
                app(["pull", *what.split()])
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"hub pull {what} ended with {end.code}") from None

    return pull


def snapshot_download() -> Callable[[str], None]:
    """The Hub's own client, as its documentation calls it."""
    from huggingface_hub import snapshot_download as download

    def pull(what: str) -> None:
        download(what)

    return pull


def main() -> None:
    """Answer until stdin ends: the versions, or the seconds that a pull took."""
    side = sys.argv[2]
    pull = {"hub": hub, "snapshot_download": snapshot_download}[side]()
    package = {"hub": "httpx", "snapshot_download": "huggingface_hub"}[side]
    for line in sys.stdin:
        what = line.strip()
        if what == "versions":
            print(json.dumps({package: version(package)}), flush=True)
            continue
        start = time.perf_counter()
        pull(what)
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
