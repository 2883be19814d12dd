"""Run the test Hub in its own process. `_peer.Peer` starts this script.

The script reads one command per line from stdin and answers each with one line of JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from hf_server import HfServer


def main() -> None:
    """Serve a folder until stdin ends.

    The command `versions` returns the address. Any other command returns the number of bytes sent
    since the last such command.
    """
    with HfServer(Path(sys.argv[2])) as server:
        for line in sys.stdin:
            if line.strip() == "versions":
                print(json.dumps(server.url), flush=True)
                continue
            print(json.dumps(sum(r.sent for r in server.requests)), flush=True)
            server.requests.clear()


if __name__ == "__main__":
    main()
