"""The command `hub`, and the one place where errors become sentences."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer
from experthub.cli import (
    cluster,
    coefficients,
    compose,
    difference,
    doctor,
    evaluate,
    experts,
    lock,
    methods,
    router,
    share,
    store,
    suggest,
    tasks,
    trace,
    train,
)
from experthub.cli._output import plain
from experthub.hub.errors import HubError

# Click's UsageError, wherever typer keeps it.
CommandLineError: type[Any] = typer.BadParameter.mro()[1]


class Interrupted(BaseException):
    """The user pressed Ctrl-C."""


class HubApp(typer.Typer):
    """The application; errors of the hub end it with a sentence, a hint and their exit code."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        def interrupt(*_: object) -> None:
            raise Interrupted

        signal.signal(signal.SIGINT, interrupt)
        everything = self.registered_commands, self.registered_groups
        self._keep_only(next(iter(args[0] if args else sys.argv[1:]), ""))
        try:
            code = super().__call__(*args, prog_name="hub", standalone_mode=False, **options)
            sys.exit(code if isinstance(code, int) else 0)
        except CommandLineError as error:
            sys.stderr.write(_wrong_words(error))
            sys.exit(2)
        except HubError as error:
            if os.environ.get("HUB_DEBUG") == "1":
                raise
            sys.stderr.write(f"error: {plain(error.message)}\n")
            if error.hint:
                sys.stderr.write(f"hint: {plain(error.hint)}\n")
            sys.exit(error.code)
        except OSError as error:
            if os.environ.get("HUB_DEBUG") == "1":
                raise
            sys.stderr.write(
                f"error: {plain(str(error))}\nhint: check the path, its permissions and the disk\n"
            )
            sys.exit(1)
        except Interrupted:
            sys.stderr.write(
                "error: interrupted\nhint: the same command goes on where it stopped\n"
            )
            sys.exit(130)
        finally:
            self.registered_commands, self.registered_groups = everything

    def _keep_only(self, word: str) -> None:
        """Leave out all commands but the one that is asked for: to build them takes longer than most run."""
        commands = [
            c
            for c in self.registered_commands
            if word == (c.name or getattr(c.callback, "__name__", ""))
        ]
        groups = [g for g in self.registered_groups if g.name == word]
        if commands or groups:
            self.registered_commands, self.registered_groups = commands, groups


def _wrong_words(error: Any) -> str:
    """A wrong command line as error and hint; the help alone where there were no words at all."""
    text = str(error.format_message())
    if text.startswith("Usage:"):
        return f"{text}\n"
    text = " ".join(text.split()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "hub"
    return f"error: {text[:1].lower()}{text[1:]}\nhint: see {command} --help\n"


app = HubApp(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Store experts (LoRA adapters, task vectors), and merge or route them on a frozen base.",
    epilog="Errors say what to do next; HUB_DEBUG=1 shows where they arose. "
    "Examples: hub list; hub show sentiment; hub compose recipe.yaml",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"experthub {version('experthub')}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


experts.register(app)
share.register(app)
difference.register(app)
methods.register(app)
compose.register(app)
coefficients.register(app)
router.register(app)
lock.register(app)
evaluate.register(app)
trace.register(app)
suggest.register(app)
cluster.register(app)
store.register(app)
doctor.register(app)
app.add_typer(train.app, name="train", epilog="Example: hub train gate sentiment --steps 30")
app.add_typer(tasks.app, name="tasks", epilog="Example: hub tasks import bigbench implicatures")
