"""Environments of the peers' own, under .venv-peers: made once, then reused.

``fisher`` (nngeometry, BackPACK) is installed without dependencies and reads torch and Guywire from
the environment that runs this, so that ours and theirs share one process and one torch. The others
stand alone, with a torch of their own; what is compared with them is relative to a plain pass in the
same process, or a whole job.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

__all__ = ["NAMES", "EnvironmentFailed", "environment"]

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
NAMES = ("avalanche", "fisher", "mergekit", "peft")
BESIDE_OURS = ("fisher",)
UNCONSTRAINED = ("avalanche",)
"""Needs a newer torch than the one that we pin, for the sake of torchvision."""


class EnvironmentFailed(RuntimeError):
    """An environment could not be made; says why."""


_failed: dict[Path, str] = {}
"""Tried once a run: pip's patience without a network is long."""


def _run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = (lines or done.stderr.splitlines() or ["no message"])[-1]
        raise EnvironmentFailed(f"{Path(words[0]).name} failed: {said}"[:300])


def environment(
    name: str,
    *,
    home: Path = ROOT / ".venv-peers",
    peers: Path = PEERS,
    run: Callable[[list[str]], None] = _run,
) -> Path:
    """Return the Python of a peer's environment, made if it is not there or its pins changed.

    Raises:
        EnvironmentFailed: no such requirements, no network, no room, or pip says no.
    """
    requirements = peers / f"{name}.txt"
    if not requirements.is_file():
        raise EnvironmentFailed(f"no requirements {requirements.name}")
    words = requirements.read_bytes() + sys.version.encode()
    wanted = hashlib.sha256(words).hexdigest()
    folder = home / name
    python, stamp = folder / "bin" / "python", folder / "made"
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if folder in _failed:
        raise EnvironmentFailed(_failed[folder])
    print(f"making {folder.name}'s environment, once", flush=True)
    try:
        run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if name not in UNCONSTRAINED:
            pip += ["-c", str(ROOT / "constraints.txt")]
        if name in BESIDE_OURS:
            pip += ["--no-deps"]
        run([*pip, "-r", str(requirements)])
        if name in BESIDE_OURS:
            _see_ours(folder)
        stamp.write_text(wanted)
    except EnvironmentFailed as error:
        _failed[folder] = str(error)
        raise
    except OSError as error:
        _failed[folder] = f"{type(error).__name__}: {error.strerror or error}"
        raise EnvironmentFailed(_failed[folder]) from error
    return python


def _see_ours(folder: Path) -> None:
    """Let an environment import what ours has; its own packages come first."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    ours = sysconfig.get_paths()["purelib"]
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
