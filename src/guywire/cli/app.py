"""The application: the commands put together, and errors turned into exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Annotated, Any

import typer

import guywire
from guywire.cli import console
from guywire.core.errors import GuywireError, UsageError

__all__ = ["COMMANDS", "make_app", "run"]

COMMANDS = ("compare", "merge", "methods", "probe", "report", "runs", "study")
"""Files in this folder, each with ``register(app)``; the order is that of ``--help``."""

_EPILOG = (
    "Every command takes --json and then prints one JSON document on standard output and nothing "
    "else there. Exit codes: 0 done, 1 the work failed, 2 the words were wrong, 130 interrupted."
)


def make_app() -> typer.Typer:
    """Put the commands together.

    Returns:
        The application.
    """
    app = typer.Typer(
        name="guywire",
        help="Hold the parameters of neural networks, and measure what training forgets.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="markdown",
    )

    @app.callback()
    def top(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
        ] = False,
    ) -> None:
        pass

    for name in COMMANDS:
        importlib.import_module(f"guywire.cli.{name}").register(app)
    return app


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code; a GuywireError is one sentence on standard error.

    Args:
        arguments: the words after ``guywire``.

    Returns:
        0 done, 1 the work failed, 2 the words were wrong, 130 interrupted, 143 terminated.
    """
    terminated = False

    def stop(*_: Any) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if console.is_main_thread() else None
    try:
        make_app()(args=arguments, prog_name="guywire")
    except SystemExit as ending:
        code = ending.code
        if code == 130 and terminated:
            return 143
        return code if isinstance(code, int) else int(code is not None)
    except UsageError as error:
        return console.fail(error, 2)
    except GuywireError as error:
        return console.fail(error, 1)
    except KeyboardInterrupt:
        return 143 if terminated else 130
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): say nothing more, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(guywire.__version__)
        raise typer.Exit
