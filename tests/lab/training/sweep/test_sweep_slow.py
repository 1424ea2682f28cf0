"""A sweep against a real PostgreSQL server, and under SIGKILL."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SETTINGS = """
methods = ["finetune", "l2", "ewc"]
seeds = 1
epochs = 4
workers = 2

[stream]
tasks = 2
classes = 4
max_per_class = 60

[evaluation]
enabled = false

[checkpoint]
steps = 20

[sweep]
sampler = "tpe"
trials = 6
batch = 2
seeds = 2
"""


def settings(folder: Path, extra: str = "") -> Path:
    path = folder / "sweep.toml"
    path.write_text(SETTINGS + extra)
    return path


def guywire(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "guywire.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def outcome(folder: Path) -> tuple[bytes, list[str]]:
    weights = [
        json.loads(path.read_text())["weights_sha256"]
        for path in sorted(folder.glob("trials/*/result.json"))
    ]
    return (folder / "sweep.json").read_bytes(), weights


def states(storage: str, folder: Path) -> list[list[str]]:
    optuna = pytest.importorskip("optuna")
    kept = optuna.storages.RDBStorage(storage)
    try:
        return [
            [t.state.name for t in kept.get_all_trials(s._study_id)]
            for s in kept.get_all_studies()
            if s.study_name.startswith(f"{folder.name}-")
        ]
    finally:
        kept.remove_session()
        kept.engine.dispose()


def start(folder: Path, config: Path, *more: str) -> subprocess.Popen[bytes]:
    words = ["compare", str(config), "--out", str(folder), *more]
    with said(folder).open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "guywire.cli", *words],
            stdout=subprocess.DEVNULL,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def said(folder: Path) -> Path:
    """Where the command started last for this folder wrote its messages."""
    return folder.with_name(f"{folder.name}.err")


@pytest.mark.multiprocess
def test_a_sweep_killed_again_and_again_equals_the_undisturbed_one(tmp_path: Path) -> None:
    config = settings(tmp_path)
    done = guywire("compare", config, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    cut = tmp_path / "cut"
    kills = 0
    for wanted in (2, 9, 17):
        process = start(cut, config, *(["--resume"] if cut.exists() else []))
        deadline = time.monotonic() + 100
        while len(list(cut.glob("sweep/*/result.json"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    assert not (cut / "sweep.json").exists()
    done = guywire("compare", config, "--out", cut, "--resume")
    assert done.returncode == 0, done.stderr
    assert outcome(cut) == outcome(tmp_path / "whole")
    found = states(f"sqlite:///{cut / 'sweep.db'}", cut)
    assert found == [["COMPLETE"] * 6] * 2  # nothing leaked as RUNNING


def test_a_sweep_on_ray_equals_a_local_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = settings(tmp_path)
    done = guywire("compare", config, "--out", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    done = guywire("compare", config, "--out", tmp_path / "ray", "--on", "ray")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "local")


def binary(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((str(f / name) for f in folders if (f / name).is_file()), shutil.which(name))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL server of our own, which wants a password; ``HOST:PORT``."""
    initdb, postgres = binary("initdb"), binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip("no PostgreSQL server binaries (initdb, postgres): the storage was NOT tested")
    who: dict[str, Any] = {}
    base = Path(tempfile.mkdtemp(prefix="pg"))
    if os.geteuid() == 0:  # a server refuses to run as root
        user = next(
            (pwd.getpwnam(n) for n in ("postgres", "nobody") if n in {p.pw_name for p in pwd.getpwall()}),
            None,
        )  # fmt: skip
        if user is None:
            pytest.skip("no unprivileged user to run PostgreSQL as: the storage was NOT tested")
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(base, user.pw_uid, user.pw_gid)
    secret = base / "secret"
    secret.write_text("s3cr3t/w@rd")
    secret.chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common: dict[str, Any] = {
        "cwd": base,
        # The C locale makes a database of the encoding SQL_ASCII, the awkward one.
        "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"},
        **who,
    }
    words = [initdb, "-D", "data", "-U", "ann", "-A", "scram-sha-256", "--pwfile", "secret", "-N"]
    subprocess.run(words, check=True, capture_output=True, timeout=60, **common)
    process = subprocess.Popen(
        [postgres, "-D", "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1",
         "-c", "unix_socket_directories=", "-c", "fsync=off"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **common,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(base, ignore_errors=True)


def test_a_study_in_postgresql(server: str, tmp_path: Path) -> None:
    secret = "s3cr3t%2Fw%40rd"
    url = f'storage = "postgresql://ann:{secret}@{server}/postgres"\n'
    small = "epochs = 1\n" + SETTINGS.replace("epochs = 4\n", "").replace(
        "trials = 6", "trials = 4"
    )
    config = tmp_path / "sweep.toml"
    config.write_text(small + url)
    plain = tmp_path / "plain.toml"
    plain.write_text(small)
    whole = tmp_path / "whole"
    assert guywire("compare", plain, "--out", whole).returncode == 0
    run = tmp_path / "run"
    process = start(run, config)
    while not list(run.glob("sweep/*/result.json")):
        assert process.poll() is None, said(run).read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Without its password the server does not let the run go on, and says so in a sentence.
    refused = guywire("compare", "--resume", "--out", run, PGPASSFILE=os.devnull)
    assert refused.returncode == 2
    assert "cannot use the storage postgresql://ann@127.0.0.1" in refused.stderr
    assert "PGPASSWORD" in refused.stderr
    wrong = guywire("compare", "--resume", "--out", run, PGPASSWORD="wr0ng")
    assert wrong.returncode == 2
    assert "wr0ng" not in wrong.stderr
    done = guywire("compare", "--resume", "--out", run, "--json", PGPASSWORD="s3cr3t/w@rd")
    assert done.returncode == 0, done.stderr
    assert outcome(run) == outcome(whole)
    assert json.loads(done.stdout)["sweep"]["evaluated_on"] == "valid"
    database = f"postgresql+psycopg://ann:{secret}@{server}/postgres?client_encoding=utf8"
    found = states(database, run)
    assert found == [["COMPLETE"] * 4] * 2
    # A second run in the same database has studies of its own.
    other = tmp_path / "other" / "run"
    done = guywire("compare", config, "--out", other)
    assert done.returncode == 0, done.stderr
    assert outcome(other) == outcome(whole)
    assert len(states(database, run)) == 4
    for path in [*run.rglob("*"), *other.rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert b"s3cr3t" not in data, path


def test_the_example_runs(tmp_path: Path) -> None:
    example = Path(__file__).parents[4] / "examples" / "sweep.toml"
    done = guywire("compare", example, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Tuned on validation data" in done.stdout
    assert 'id="sweep"' in (tmp_path / "run/report.html").read_text()
