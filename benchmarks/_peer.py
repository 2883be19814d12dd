"""Start a peer in its own process and virtual environment, and exchange commands with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _bench import THREADS

HERE = Path(__file__).resolve().parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}


class Peer:
    """A script of this folder that runs in its own process.

    It runs one command at a time and waits in between.

    Args:
        python: The interpreter of the peer's virtual environment.
        script: The name of the script in this folder.
        *options: The options of the script.
        variables: The environment variables to set in addition to those of this process.
        own: Whether the script is our side, which may import from this folder.
    """

    def __init__(
        self,
        python: Path,
        script: str,
        *options: str | Path,
        variables: dict[str, str] = OFFLINE,
        own: bool = False,
    ) -> None:
        # `-I` keeps this folder off the path, because `evaluate` is also a package that lm-eval imports.
        isolated = () if own else ("-I",)
        self._process = subprocess.Popen(
            [python, *isolated, HERE / script, str(THREADS), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=make_environment() | variables,
        )
        self.versions = self.ask("versions")

    def ask(self, command: str) -> Any:
        """Send a command and return the answer.

        Args:
            command: The command, one line.

        Returns:
            The answer; for a timed command, the seconds that it took in the peer's process.

        Raises:
            RuntimeError: If the peer has ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the pipes to the peer are missing")
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended at {command!r}; its error is printed above")
        return json.loads(line)

    def close(self) -> None:
        """Close the pipes and wait until the process ends."""
        self._process.communicate()


def make_environment() -> dict[str, str]:
    """Return the variables of this process without tokens, which no other program needs."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and "TOKEN" not in k}


def environment(
    folder: Path, packages: tuple[str, ...], pins: tuple[str, ...] = (), whole: bool = False
) -> Path:
    """Return the interpreter of a virtual environment, which is created once per set of versions.

    Args:
        folder: The folder of the environment.
        packages: The packages to install in the versions of `constraints.txt`.
        pins: Further requirements.
        whole: Whether these are all packages, so that their own requirements are skipped.

    Returns:
        The path of the interpreter.

    Raises:
        CalledProcessError: If the installation fails.
    """
    constraints, mark = HERE.parent / "constraints.txt", folder / "versions.txt"
    starts = tuple(f"{name}==" for name in packages)
    wanted = [*pins, *(p for p in constraints.read_text().splitlines() if p.startswith(starts))]
    python = folder / "bin" / "python"
    if not mark.is_file() or mark.read_text().splitlines() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        isolated = {"check": True, "cwd": sys.prefix, "env": make_environment()}
        subprocess.run([sys.executable, "-P", "-I", "-m", "venv", folder.absolute()], **isolated)
        how = ["--no-deps"] if whole else ["-c", constraints]
        install = [python.absolute(), "-P", "-I", "-m", "pip", "install", "-qq", *how, *wanted]
        subprocess.run(install, stdout=sys.stderr, **isolated)
        mark.write_text("\n".join(wanted))
    return python


def peft(cache: Path, base: Path, experts: list[Path]) -> Peer:
    """Start `_peft.py` with the base and the experts loaded.

    Args:
        cache: The folder of the virtual environments.
        base: The folder of the base.
        experts: The folders of the experts.

    Returns:
        The peer.
    """
    python = environment(cache / "peft-venv", ("torch", "transformers", "peft"))
    return Peer(python, "_peft.py", base, *experts)
