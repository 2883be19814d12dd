"""A peer's process as ours sees it: its virtual environment, and a line of JSON per command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _bench import THREADS

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}


class Peer:
    """A script of this folder in its own virtual environment.

    It does one command at a time, and waits between.  variables: of its environment, besides ours.
    own: it is our side, in a process of its own.
    """

    def __init__(
        self,
        python: Path,
        script: str,
        *options: str | Path,
        variables: dict[str, str] = OFFLINE,
        own: bool = False,
    ) -> None:
        # -I: this folder must not be on its path, where `evaluate` is one of lm-eval's own packages.
        isolated = () if own else ("-I",)
        self._process = subprocess.Popen(
            [python, *isolated, HERE / script, str(THREADS), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables,
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


def environment(
    folder: Path, packages: tuple[str, ...], pins: tuple[str, ...] = (), whole: bool = False
) -> Path:
    """The interpreter of an environment, made once for one set of versions.

    packages: pinned as ours are.  pins: requirements of its own.  whole: these are all there is, and
    what they require besides is left out.  CalledProcessError when it cannot be installed.
    """
    constraints, mark = HERE.parent / "constraints.txt", folder / "versions.txt"
    starts = tuple(f"{name}==" for name in packages)
    wanted = [*pins, *(p for p in constraints.read_text().splitlines() if p.startswith(starts))]
    python = folder / "bin" / "python"
    if not mark.is_file() or mark.read_text().splitlines() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        how = ["--no-deps"] if whole else ["-c", constraints]
        install = [python, "-m", "pip", "install", "-qq", *how, *wanted]
        subprocess.run(install, check=True, stdout=sys.stderr)
        mark.write_text("\n".join(wanted))
    return python


def peft(cache: Path, base: Path, experts: list[Path]) -> Peer:
    """`_peft.py`, with the base and the experts loaded."""
    python = environment(cache / "peft-venv", ("torch", "transformers", "peft"))
    return Peer(python, "_peft.py", base, *experts)
