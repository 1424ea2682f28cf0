"""Against real clusters on the loopback address: slow, hence apart (``make test-slow``)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]

LONG = """
methods = ["ewc", "replay"]
seeds = 1
epochs = 30
batch_size = 16
[stream]
tasks = 3
[checkpoint]
seconds = 0.4
"""


class Nodes:
    """A cluster with a head without cores and so many nodes with one core each."""

    def __init__(self, count: int, **more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.client_port = probe.getsockname()[1]
        self.folder = tempfile.mkdtemp(prefix="gwr-", dir="/tmp")
        script = Path(__file__).with_name("ray_nodes.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(count), str(self.client_port), self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Or Ray turns 127.0.0.1 into the machine's outward address, where nothing listens.
            env=environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **more),
        )
        self.address = self.hear()["address"]

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise AssertionError("the cluster did not start")

    def kill(self, pid: int) -> None:
        """Kill the node on which a process works."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"kill {pid}\n")
        self.process.stdin.flush()
        assert self.hear() == {"killed": pid}

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"} | more


@contextlib.contextmanager
def nodes(count: int, **more: str) -> Iterator[Nodes]:
    cluster = Nodes(count, **more)
    try:
        yield cluster
    finally:
        cluster.stop()


def start(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, "compare", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


# A test runner in the background may have told us to ignore SIGINT; children inherit that.
_MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from guywire.cli import main; sys.exit(main())"
)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return err


def essence(run: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(run.glob("trials/*/result.json")):
        result = json.loads(path.read_text())
        curves = _without_time(path.parent)
        found[path.parent.name] = (result["weights_sha256"], result["accuracy_matrix"], curves)
    return found


def _without_time(trial: Path) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(trial / "metrics.parquet").to_pydict()
    return {name: repr(column) for name, column in table.items() if "second" not in name}


def until(ready: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert process.poll() is None, process.communicate()
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"that took too long: {process.communicate()}")
        time.sleep(0.05)
    return found


def saved(trial: Path) -> Callable[[], bool]:
    from guywire.lab.training.ray_node import step_of

    def ready() -> bool:
        path = trial / "state.safetensors"
        return path.is_file() and (step_of(path.read_bytes()) or 0) > 20

    return ready


def log(run: Path, trial: str) -> str:
    path = run / "trials" / trial / "log.txt"
    return path.read_text() if path.is_file() else ""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("local")
    (folder / "c.toml").write_text(LONG)
    finish(start(folder, "c.toml", "--out", "run"))
    return essence(folder / "run")


def ours(pattern: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if pattern in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
    return found


def test_a_dead_worker_and_a_dead_node_cost_only_time(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    (tmp_path / "c.toml").write_text(LONG)
    run = tmp_path / "run"
    first, second = "ewc-seed0", "replay-seed0"
    with nodes(2) as cluster:
        # By the cluster's own port, as a driver on one of its nodes.
        process = start(tmp_path, "c.toml", "--out", "run", "--on", f"ray://{cluster.address}")
        until(saved(run / "trials" / first), process)
        until(saved(run / "trials" / second), process)
        pid = int(re.findall(r"pid (\d+)", log(run, first))[-1])
        os.kill(pid, signal.SIGKILL)
        until(lambda: "attempt 2 goes on" in log(run, first), process)
        until(lambda: "going on from step" in log(run, first), process)
        cluster.kill(int(re.findall(r"pid (\d+)", log(run, first))[-1]))
        until(lambda: "attempt 3 goes on" in log(run, first), process)
        err = finish(process)
    assert "attempt 2 goes on from step" in err
    assert "its process died" in log(run, first)
    assert "its node died" in log(run, first)
    steps = [int(n) for n in re.findall(r"going on from step (\d+)", log(run, first))]
    assert steps[0] > 20
    assert essence(run) == undisturbed


def test_ray_client_then_ctrl_c_then_local(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    (tmp_path / "c.toml").write_text(LONG)
    run = tmp_path / "run"
    with nodes(2, GUYWIRE_DATA=str(tmp_path / "nowhere")) as cluster:
        address = f"ray://127.0.0.1:{cluster.client_port}"
        process = start(tmp_path, "c.toml", "--out", "run", "--on", address)
        until(saved(run / "trials" / "ewc-seed0"), process)
        process.send_signal(signal.SIGINT)
        err = finish(process, 130)
        assert "--resume" in err
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"

        # A request that no node can meet is a sentence, before anything is written.
        words = ["c.toml", "--out", "other", "--resources", '{"GPU": 1}', "--on", address]
        err = finish(start(tmp_path, *words), 2)
        assert "no node of this Ray can ever run a trial that asks for CPU 1, GPU 1" in err
        assert not (tmp_path / "other").exists()

        # Of data that a node lacks, the sentence names the node and the path.
        if "GUYWIRE_DATA" in os.environ:
            words = ["--data", "mnist", "--max-per-class", "10", "--methods", "finetune"]
            words += ["--seeds", "1", "--epochs", "1", "--out", "third", "--on", address]
            err = finish(start(tmp_path, *words), 1)
            assert "cannot load data or model" in err
            assert str(tmp_path / "nowhere") in err
    finish(start(tmp_path, "--out", "run", "--resume", "--on", "local"))
    assert essence(run) == undisturbed


def test_a_ray_of_our_own_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(LONG)
    home = tmp_path / "home"
    home.mkdir()
    run = tmp_path / "run"
    process = start(tmp_path, "c.toml", "--out", "run", "--on", "ray", HOME=str(home))
    mark = f"guywire-ray-{process.pid}-"  # other tests may have a Ray of their own meanwhile
    until(saved(run / "trials" / "ewc-seed0"), process)
    assert "attempt 1 on 127.0.0.1 (" in log(run, "ewc-seed0")  # loopback only
    assert len(list(Path("/tmp").glob(f"{mark}*"))) == 1
    assert ours(mark)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in finish(process, 130)
    end = time.monotonic() + 20
    while ours(mark) and time.monotonic() < end:
        time.sleep(0.2)
    assert not ours(mark), "a process of Ray lives on"
    assert not list(Path("/tmp").glob(f"{mark}*"))
    assert not (home / ".ray").exists()


def test_a_ray_of_our_own_dies_with_a_driver_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(LONG)
    process = start(tmp_path, "c.toml", "--out", "run", "--on", "ray")
    until(saved(tmp_path / "run" / "trials" / "ewc-seed0"), process)
    (folder,) = Path("/tmp").glob(f"guywire-ray-{process.pid}-*")
    assert ours(str(folder))
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while ours(str(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not ours(str(folder)), "a process of Ray lives on"
    shutil.rmtree(folder, ignore_errors=True)


def test_nothing_there(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    err = finish(start(tmp_path, "--out", "run", "--on", f"ray://127.0.0.1:{port}"), 2)
    assert f"nothing answers at 127.0.0.1:{port}" in err
    assert not (tmp_path / "run").exists()
