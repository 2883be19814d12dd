"""Pull a repository with `hub pull` or `snapshot_download`. `_peer.Peer` starts this script.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
All modules that a side needs are imported before the first answer.
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
IMPORTS += [f"experthub.hub.{name}" for name in ("bases.base_sources", "transfer.describe")]
IMPORTS += [f"experthub.hub.transfer.{name}" for name in ("pull", "remotes.hf")]


def hub() -> Callable[[str], None]:
    """Return a function that runs `hub pull` in this process."""
    for name in IMPORTS:
        import_module(name)
    from experthub.cli.main import app

    def pull(what: str) -> None:
        with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
            try:
                app(["pull", *what.split()])
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"hub pull {what} exited with code {end.code}") from None

    return pull


def snapshot_download() -> Callable[[str], None]:
    """Return a function that calls the Hub's own client, as its documentation does."""
    from huggingface_hub import snapshot_download as download

    def pull(what: str) -> None:
        download(what)

    return pull


def main() -> None:
    """Answer commands until stdin ends, with the versions or with the seconds that a pull took."""
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
