"""The application: the commands put together, and errors turned into exit codes."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

import guywire
from guywire.cli import console
from guywire.core.errors import GuywireError, UsageError

__all__ = ["COMMANDS", "make_app", "run"]

COMMANDS = ("compare", "merge", "methods", "probe", "report", "runs", "study")
"""Files in this folder, each with ``register(app)``; the order is that of ``--help``."""

_GO_ON = {
    "merge": "go on with the same command and --resume",
    "study": "go on with the same command: what had finished is kept",
}
"""How, for commands that do not say so themselves."""

_EPILOG = (
    "Every command takes --json and then prints one JSON document on standard output and nothing "
    "else there. Exit codes: 0 done, 1 the work failed, 2 the words were wrong, 130 interrupted, "
    "143 terminated."
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
        0 done, 1 the work failed, 2 the words were wrong, 130 interrupted, 143 terminated, 129 when
        the terminal was closed.
    """
    with _ended_by_signals() as interrupted:
        try:
            make_app()(args=arguments, prog_name="guywire")
        except SystemExit as ending:
            code = ending.code
            if code == 130:
                return interrupted(arguments)
            return code if isinstance(code, int) else int(code is not None)
        except UsageError as error:
            return console.fail(error, 2)
        except GuywireError as error:
            return console.fail(error, 1)
        except KeyboardInterrupt:
            return interrupted(arguments)
        except BrokenPipeError:
            # Whoever read our output has gone (`| head`): say nothing more, at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    return 0


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[Callable[[list[str]], int]]:
    """Let a scheduler's SIGTERM and a closed terminal's SIGHUP end the work as Ctrl-C does.

    Yields:
        What says how to go on, and returns the exit code.
    """
    number, heard = signal.SIGINT, float("-inf")

    def stop(which: int, _: object) -> None:
        nonlocal number, heard
        again, heard, number = (
            time.monotonic() - heard < 10.0,
            time.monotonic(),
            signal.Signals(which),
        )
        if not again:  # some schedulers send it twice: the first is being obeyed
            raise KeyboardInterrupt

    def interrupted(arguments: list[str]) -> int:
        hint = _GO_ON.get(arguments[0]) if arguments else None
        if hint is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                sys.stderr.write(f"\nguywire: interrupted; {hint}\n")
        return 128 + number

    before: dict[int, Any] = {}
    if console.is_main_thread():
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
        hangup = getattr(signal, "SIGHUP", None)  # not everywhere
        if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:  # nohup ignores it
            before[hangup] = signal.signal(hangup, stop)
    try:
        yield interrupted
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(guywire.__version__)
        raise typer.Exit
