"""The command `hub`, which also turns errors into messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from experthub.cli import (
    bases,
    cluster,
    coefficients,
    compose,
    convert,
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
from experthub.cli._output import drop_output, open_streams
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import DRAFT
from experthub.hub.files.safe_text import escape, escape_block

# Click's UsageError, wherever typer keeps it.
CommandLineError: type[Any] = typer.BadParameter.mro()[1]


class Interrupted(BaseException):
    """The exception that is raised when the user presses Ctrl-C."""


class HubApp(typer.Typer):
    """The application; an error ends it with a message, a hint and an exit code."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit; with HUB_DEBUG=1, errors keep their traceback."""

        def interrupt(*_: object) -> None:
            raise Interrupted

        signal.signal(signal.SIGINT, interrupt)
        open_streams()
        everything = self.registered_commands, self.registered_groups
        self._keep_only(next(iter(args[0] if args else sys.argv[1:]), ""))
        try:
            with warnings.catch_warnings():
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
                code = super().__call__(*args, prog_name="hub", standalone_mode=False, **options)
            sys.stdout.flush()
            sys.exit(code if isinstance(code, int) else 0)
        except CommandLineError as error:
            sys.stderr.write(_explain_usage_error(error))
            sys.exit(2)
        except (HubError, ImportError) as error:  # A broken plug-in is an ImportError with a hint.
            hint = getattr(error, "hint", None)
            if os.environ.get("HUB_DEBUG") == "1" or hint is None:
                raise
            sys.stderr.write(f"error: {escape(str(error))}\n")
            if hint:
                sys.stderr.write(f"hint: {escape(hint)}\n")
            sys.exit(getattr(error, "code", 1))
        except BrokenPipeError:
            drop_output()
            sys.exit(1)  # As typer does, without a message: the reader wanted no more.
        except OSError as error:
            drop_output()
            if os.environ.get("HUB_DEBUG") == "1":
                raise
            sys.stderr.write(
                f"error: {escape(_explain_os_error(error))}\n"
                "hint: check the path, its permissions and the disk\n"
            )
            sys.exit(1)
        except Interrupted:
            sys.stderr.write("error: interrupted\nhint: run the same command again to continue\n")
            sys.exit(130)
        finally:
            self.registered_commands, self.registered_groups = everything

    def _keep_only(self, word: str) -> None:
        """Keep only the called command; building all of them takes longer than most of them run."""
        commands = [
            c
            for c in self.registered_commands
            if word == (c.name or getattr(c.callback, "__name__", ""))
        ]
        groups = [g for g in self.registered_groups if g.name == word]
        if commands or groups:
            self.registered_commands, self.registered_groups = commands, groups


def _show_warning(otherwise: Any, message: Any, category: Any, *place: Any, **options: Any) -> None:
    """Show a warning of the hub as a note, and no deprecations: those are for who calls a library."""
    if category.__name__ == "UnsafeFileWarning":
        sys.stderr.write(f"note: {escape(str(message))}\n")
    elif not issubclass(category, FutureWarning):
        otherwise(message, category, *place, **options)


def _explain_os_error(error: OSError) -> str:
    """Format an error of the system: the path, not that of its draft, and what is wrong with it."""
    if not error.strerror or not isinstance(error.filename, str | bytes):
        return str(error)
    path = Path(os.fsdecode(error.filename))
    if DRAFT.fullmatch(path.name):
        path = path.with_name(path.name[1:].rpartition(".")[0])
    return f"{path}: {error.strerror[:1].lower()}{error.strerror[1:]}"


def _explain_usage_error(error: Any) -> str:
    """Format a usage error as an error and a hint; a command without arguments gets its help."""
    text = str(error.format_message())
    if text.startswith("Usage:"):
        return f"{escape_block(text)}\n"
    text = escape(" ".join(text.split()).rstrip("."))
    command = error.ctx.command_path if error.ctx else "hub"
    return f"error: {text[:1].lower()}{text[1:]}\nhint: see {command} --help\n"


app = HubApp(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Store experts (LoRA adapters, task vectors), and merge or route them on a frozen base.",
    epilog="Errors come with a hint; HUB_DEBUG=1 shows their traceback. "
    "Examples: hub list; hub show sentiment; hub compose recipe.yaml",
)


def _print_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"experthub {version('experthub')}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


experts.register(app)
share.register(app)
difference.register(app)
convert.register(app)
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
app.add_typer(bases.app, name="base", epilog="Example: hub base add mine ./model.gguf")
app.add_typer(train.app, name="train", epilog="Example: hub train gate sentiment --steps 30")
app.add_typer(tasks.app, name="tasks", epilog="Example: hub tasks import bigbench implicatures")
