"""A full, read-only or vanished disk: a sentence, nothing half written, and on when there is room."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import guywire_faults as faults
import pytest

from guywire.lab.training.run import RunFolder


def check_full(tmp_path: Path, whole: faults.Finished, count: int) -> None:
    out = tmp_path / str(count) / "run"
    out.parent.mkdir()
    with faults.disk_full_from(count) as names:
        code, printed, err = faults.compare(out)
    if count >= len(names):
        assert code == 0
        return
    what = f"full from write {count}, {names[count]}"
    assert list(out.rglob("*.tmp")) == [], what
    if names[count] == "report.html":
        assert code == 0
        assert "the report failed" in err
    else:
        assert code == 1, (what, printed, err)
        faults.check_sentence(err, "cannot write", "No space left on device", "free some space")
    answer = faults.resume(out) if (out / "run.json").exists() else faults.compare(out, "--resume")
    faults.check_equal(out, answer, whole, what)


def test_the_disk_is_full(tmp_path: Path, whole: faults.Finished) -> None:
    check_full(tmp_path, whole, 6)  # at the first state


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_disk_is_full_at_any_write(tmp_path: Path, whole: faults.Finished) -> None:
    (tmp_path / "counted").mkdir()
    with faults.disk_full_from(10**9) as names:
        assert faults.compare(tmp_path / "counted" / "run")[0] == 0
    draw = random.Random(faults.SEED)
    first = [n for n, name in enumerate(names) if name != "state.safetensors"]
    states = draw.sample([n for n in range(len(names)) if n not in first], 6)
    for count in sorted([*first, *states]):
        check_full(tmp_path, whole, count)


@contextlib.contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "guywire-test", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        # Whatever looks at file systems (a Ray beside us, say) may have it open for a moment.
        end = time.monotonic() + 10
        while subprocess.run(["umount", str(folder)], check=False).returncode:
            assert time.monotonic() < end, f"{folder} is still in use"
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_file_system_fills_up(tmp_path: Path, whole: faults.Finished) -> None:
    used = sum(p.stat().st_size for p in whole.folder.rglob("*") if p.is_file()) // 1024
    draw = random.Random(faults.SEED)
    for number, free in enumerate([0, 8, *(draw.randrange(16, used) for _ in range(8))]):
        disk = tmp_path / str(number)
        what = f"GUYWIRE_FAULT_SEED={faults.SEED}, {free} kB free"
        with mounted(disk, 8 * used):
            faults.settings_in(disk)
            room = shutil.disk_usage(disk).free - free * 1024
            (disk / "ballast").write_bytes(b"x" * (room // 4096 * 4096))
            code, _, err = faults.call(
                "compare", str(disk / "settings.toml"), "--out", str(disk / "run"), "--workers", "0"
            )
            assert "Traceback" not in err, (what, err)
            assert list(disk.rglob("*.tmp")) == [], what
            if code != 0:
                assert code == 1, (what, err)
                faults.check_sentence(err, "cannot write", "No space left on device")
            (disk / "ballast").unlink()
            begun = (disk / "run" / "run.json").exists()
            answer = (
                faults.resume(disk / "run") if begun else faults.compare(disk / "run", "--resume")
            )
            faults.check_equal(disk / "run", answer, whole, what)


@pytest.mark.slow
def test_a_read_only_file_system(tmp_path: Path, whole: faults.Finished) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, 20_000):
        shutil.copytree(whole.folder, disk / "run")
        faults.settings_in(disk)
        again = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(again, check=True)
        code, _, err = faults.resume(disk / "run")
        assert code == 1
        faults.check_sentence(err, str(disk / "run"), "Read-only", "choose another")
        settings = str(disk / "settings.toml")
        code, _, err = faults.call("compare", settings, "--out", str(disk / "new"))
        assert code == 1
        faults.check_sentence(err, str(disk / "new"), "Read-only", "choose another")
        assert faults.call("runs", str(disk))[0] == 0


def test_the_folder_vanishes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with faults.at_step("replay-seed0", 3, lambda: shutil.rmtree(out)):
        code, _, err = faults.compare(out, "--seeds", "1")
    assert code == 1
    faults.check_sentence(err, "cannot write", str(out), "its folder has vanished")
    assert not out.exists()


def test_two_processes_in_one_folder(tmp_path: Path, half: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    before = (run / "run.json").read_bytes()
    with RunFolder(run).locked():
        code, _, err = faults.resume(run)
    assert code == 2
    faults.check_sentence(err, "another process is at work in", str(run))
    assert (run / "run.json").read_bytes() == before


def test_a_look_at_the_lock_keeps_nobody_out(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        pid = os.fork()
        if pid == 0:
            try:
                with RunFolder(tmp_path).locked():
                    os._exit(0)
            finally:
                os._exit(1)
        fcntl.flock(file, fcntl.LOCK_UN)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
