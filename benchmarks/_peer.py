"""The peer's process as ours sees it: its virtual environment, and a line of JSON per command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _bench import THREADS
from experthub.hub.bases import Base

HERE = Path(__file__).parent
PACKAGES = ("torch==", "transformers==", "peft==")


class Peer:
    """`_peft.py` in its own virtual environment: does one command at a time, and waits between."""

    def __init__(self, cache: Path, base: Base, experts: list[Path]) -> None:
        python = _environment(cache / "peft-venv")
        command = [python, "-I", HERE / "_peft.py", str(THREADS), base.folder, *experts]
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables | {"HF_HUB_OFFLINE": "1"},
        )
        self.versions = self.ask("versions")

    def ask(self, command: str) -> Any:
        """The peer's answer; for a measured command, the seconds it took there."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the peer has no pipes")
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended at {command!r}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


def _environment(folder: Path) -> Path:
    """The peer's interpreter; the environment is made once for one set of pinned versions."""
    constraints, mark = HERE.parent / "constraints.txt", folder / "versions.txt"
    pins = [p for p in constraints.read_text().splitlines() if p.startswith(PACKAGES)]
    python = folder / "bin" / "python"
    if not mark.is_file() or mark.read_text().splitlines() != pins:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-qq", "-c", constraints, *pins]
        subprocess.run(install, check=True, stdout=sys.stderr)
        mark.write_text("\n".join(pins))
    return python
