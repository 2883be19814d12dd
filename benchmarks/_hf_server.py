"""The Hub of the tests in a process of its own; run by `_peer.Peer`.

Reads one command a line from stdin, and answers each with one line of JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from hf_server import HfServer


def main() -> None:
    """Serve a folder until stdin ends; `versions` is its address, `sent` the bytes since the last time."""
    with HfServer(Path(sys.argv[2])) as server:
        for line in sys.stdin:
            if line.strip() == "versions":
                print(json.dumps(server.url), flush=True)
                continue
            print(json.dumps(sum(r.sent for r in server.requests)), flush=True)
            server.requests.clear()


if __name__ == "__main__":
    main()
