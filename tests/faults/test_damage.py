"""A file that was cut short or corrupted is made again, or named with what to do; never believed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import guywire_faults as faults
import pytest

from guywire.core import checkpoint
from guywire.core.errors import CheckpointError

DONE, OPEN = "trials/ewc-seed0", "trials/replay-seed0"
FINISHED = (
    "config.toml",
    "run.json",
    "stream.json",
    "results.parquet",
    "report.html",
    "samples/task-1.png",
    f"{DONE}/state.safetensors",
    f"{DONE}/progress.json",
    f"{DONE}/metrics.parquet",
    f"{DONE}/result.json",
)
STOPPED = (
    "config.toml",
    "run.json",
    f"{DONE}/metrics.parquet",
    f"{DONE}/result.json",
    f"{OPEN}/state.safetensors",
    f"{OPEN}/progress.json",
    f"{OPEN}/error.json",
)
REMARKS = {
    f"{OPEN}/progress.json": '{"step": 12, "total": 36, "task": 1, "epoch": 0}',
    f"{OPEN}/error.json": '{"error": "a disk failed", "traceback": null}',
}
# Files that cannot be made again in place: named, and the sentence says to delete them.
NAMED = ("run.json", f"{OPEN}/state.safetensors")


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return folder / "run"


def check_mended(run: Path, file: str, whole: faults.Finished, what: str) -> None:
    others = {p: p.read_bytes() for p in run.glob("trials/*/result.json") if p != run / file}
    answer = faults.resume(run)
    if answer[0] != 0:
        assert file in NAMED, (what, answer[2])
        faults.check_sentence(answer[2], str(run / file), "delete it")
        (run / file).unlink()
        answer = faults.resume(run)
    faults.check_equal(run, answer, whole, what)
    # Trials that were whole are as they were, the time they took included.
    mended = [p for p, data in others.items() if p.read_bytes() != data]
    assert mended == [], what


def check_cut(run: Path, file: str, whole: faults.Finished, folder: Path, length: int) -> None:
    copy = copied(run, folder)
    path = copy / file
    if file in REMARKS:  # it depends on the clock whether there is one
        path.write_text(REMARKS[file])
    path.write_bytes(path.read_bytes()[:length])
    faults.call("report", str(copy))  # may fail, must not raise
    check_mended(copy, file, whole, f"{file} cut to {length} bytes")


def lengths(size: int, draw: random.Random) -> list[int]:
    found = {0, 1, 7, size // 2, size - 1, draw.randrange(size), draw.randrange(size)}
    return sorted(length for length in found if length < size)


@pytest.mark.parametrize("file", [f"{DONE}/result.json", f"{DONE}/metrics.parquet"])
def test_a_cut_result_is_made_again_from_the_state(
    tmp_path: Path, whole: faults.Finished, file: str
) -> None:
    check_cut(whole.folder, file, whole, tmp_path, 200)


def test_settings_that_were_cut_between_two_lines_do_not_fall_back_to_defaults(
    tmp_path: Path, whole: faults.Finished
) -> None:
    text = (whole.folder / "config.toml").read_bytes()
    check_cut(whole.folder, "config.toml", whole, tmp_path, text.index(b"\n[stream]"))


def test_settings_that_were_changed_are_refused(tmp_path: Path, whole: faults.Finished) -> None:
    run = copied(whole.folder, tmp_path)
    path = run / "config.toml"
    path.write_text(path.read_text().replace("epochs = 3", "epochs = 4"))
    code, _, err = faults.resume(run)
    assert code == 1
    faults.check_sentence(err, str(path), "was changed since the run began", "delete it")
    path.unlink()
    faults.check_equal(run, faults.resume(run), whole, "settings deleted")
    # When states are saved is nobody's business but the user's.
    path.write_text(path.read_text().replace("steps = 5", "steps = 6"))
    assert faults.resume(run)[0] == 0


def test_a_damaged_state_costs_its_trial_only(
    tmp_path: Path, half: Path, whole: faults.Finished
) -> None:
    check_cut(half, f"{OPEN}/state.safetensors", whole, tmp_path, 5000)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FINISHED)
def test_a_finished_run_with_a_file_cut_short(
    tmp_path: Path, whole: faults.Finished, file: str
) -> None:
    draw = random.Random(f"{faults.SEED} {file}")
    for length in lengths((whole.folder / file).stat().st_size, draw):
        (tmp_path / str(length)).mkdir()
        check_cut(whole.folder, file, whole, tmp_path / str(length), length)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", STOPPED)
def test_a_stopped_run_with_a_file_cut_short(
    tmp_path: Path, half: Path, whole: faults.Finished, file: str
) -> None:
    draw = random.Random(f"{faults.SEED} {file}")
    size = len(REMARKS[file]) if file in REMARKS else (half / file).stat().st_size
    for length in lengths(size, draw):
        (tmp_path / str(length)).mkdir()
        check_cut(half, file, whole, tmp_path / str(length), length)


def regions(data: bytes) -> dict[str, range]:
    """Where in a checkpoint what lies."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = {"length": range(8), "header": range(8, end), "tensors": range(end, len(data))}
    for name in (b"payload_sha256", b"structure_sha256", b'"tree"'):
        at = data.index(name)
        found[name.decode().strip('"')] = range(at, at + 60)
    return found


def same(a: Any, b: Any) -> bool:
    if hasattr(a, "numel"):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_corrupted_byte_of_a_checkpoint_is_never_believed(tmp_path: Path, half: Path) -> None:
    data = (half / OPEN / "state.safetensors").read_bytes()
    tree = checkpoint.load(half / OPEN / "state.safetensors")
    path = tmp_path / "state.safetensors"
    draw = random.Random(faults.SEED)
    harmless = 0
    for name, region in regions(data).items():
        for at in {*draw.sample(region, min(len(region), 40)), region[0], region[-1]}:
            flipped = bytearray(data)
            flipped[at] ^= draw.randrange(1, 256)
            path.write_bytes(flipped)
            found: Any = None
            said = str(path)
            try:
                found = checkpoint.load(path)
            except CheckpointError as error:
                said = str(error)
            assert str(path) in said, (faults.SEED, name, at)
            if found is None:
                continue
            # One blank of the header for another.
            assert flipped[at] in b" \t\n\r", (faults.SEED, name, at)
            assert same(found, tree), (faults.SEED, name, at)
            harmless += 1
    assert harmless < 5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "region", ["length", "header", "tensors", "payload_sha256", "structure_sha256", "tree"]
)
def test_a_run_with_a_corrupted_state(
    tmp_path: Path, half: Path, whole: faults.Finished, region: str
) -> None:
    file = f"{OPEN}/state.safetensors"
    run = copied(half, tmp_path)
    data = bytearray((run / file).read_bytes())
    at = random.Random(f"{faults.SEED} {region}").choice(regions(bytes(data))[region])
    data[at] ^= 0x55
    (run / file).write_bytes(data)
    code, _, err = faults.resume(run)
    assert code == 1, f"byte {at} of {region}"
    faults.check_sentence(err, str(run / file), "1 of 4 trials failed")
    done = {p.parent.name for p in run.glob("trials/*/result.json")}
    assert done == {p.parent.name for p in whole.folder.glob("trials/*/result.json")} - {
        "replay-seed0"
    }
    check_mended(run, file, whole, f"byte {at} of {region}")


def test_a_report_does_without_files_that_only_inform(
    tmp_path: Path, whole: faults.Finished
) -> None:
    run = copied(whole.folder, tmp_path)
    (run / DONE / "progress.json").write_bytes(b'{"step"')
    assert faults.call("report", str(run))[0] == 0
    (run / DONE / "result.json").unlink()
    (run / DONE / "error.json").write_bytes(b"")
    assert faults.call("report", str(run))[0] == 0
    assert "error.json is damaged" in (run / "report.html").read_text()


def test_the_list_of_runs_tells_of_a_damaged_one(tmp_path: Path, whole: faults.Finished) -> None:
    run = copied(whole.folder, tmp_path)
    (run / "run.json").write_bytes(b"{")
    code, out, _ = faults.call("runs", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["status"] == "damaged"
