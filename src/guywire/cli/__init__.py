"""The commands: ``guywire compare``, ``methods``, ``probe``, ``report``, ``runs``, ``study``.

One file a command, each with a function ``register(app)``. A new command is a new file and its name
in ``guywire.cli.app.COMMANDS``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDED = ("typer", "rich", "pydantic", "tomli_w", "platformdirs", "pyarrow", "sklearn", "PIL")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, as the shell would.

    Args:
        arguments: the words after ``guywire``; those of this process if ``None``.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the words were wrong, 130 interrupted.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            sys.stderr.write(
                f"guywire: the commands need the package {name!r}, which is not installed: "
                "pip install 'guywire[cli]'\n"
            )
            return 1
    from guywire.cli.app import run

    return run(list(sys.argv[1:] if arguments is None else arguments))
