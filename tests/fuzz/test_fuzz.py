"""Malformed inputs of every format: success or one sentence; no hang, no gigabytes, nothing elsewhere.

The fast sample runs in this process; ``make test-slow`` tries more than ten thousand in children whose
memory is limited. ``python tests/fuzz/fuzz_run.py FORMAT SEED NUMBER`` repeats one input.
"""

from __future__ import annotations

import os
import time

import fuzz_run
import pytest

# name -> (inputs in the fast suite, inputs in `make test-slow`)
COUNTS = {
    "config": (8, 700), "flags": (6, 400), "idx": (50, 1900), "images": (60, 1900),
    "folder": (12, 500), "parquet": (20, 1200), "texts": (40, 1100), "header": (30, 800),
    "index": (12, 500), "adapters": (15, 600), "deltas": (20, 1000), "ours": (30, 1500),
    "runs": (0, 300), "probe": (0, 200),
}  # fmt: skip
SEED = int(os.environ.get("GUYWIRE_FUZZ_SEED", "2026"))


def said(tally: fuzz_run.Tally) -> str:
    return "\n\n".join(
        f"{tally.name} {SEED} {number}:\n{why}" for number, why in tally.findings[:5]
    )


def test_every_format_is_tried_and_there_are_ten_thousand():
    assert COUNTS.keys() == fuzz_run.formats().keys()
    assert sum(slow for _, slow in COUNTS.values()) >= 10_000


@pytest.mark.filterwarnings("ignore")  # what a damaged image makes PIL warn of is not our matter
@pytest.mark.parametrize("name", [name for name, (fast, _) in COUNTS.items() if fast])
def test_a_sample_of_malformed_inputs(name, tmp_path):
    tally = fuzz_run.in_process(name, SEED + 1, range(COUNTS[name][0]), tmp_path)
    assert not tally.findings, said(tally)
    assert tally.outcomes["refused"] > tally.tried / 4, tally.outcomes  # they are malformed indeed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COUNTS))
def test_malformed_inputs(name, tmp_path, record_property):
    _begun, count = time.monotonic(), COUNTS[name][1]
    tally = fuzz_run.in_children(name, SEED, count, tmp_path)
    assert not tally.findings, said(tally)
    assert sum(tally.outcomes.values()) == count
    assert tally.tried > 0.75 * count  # some mutations may come to nothing
    assert tally.outcomes["refused"] > count / 10
    assert len(tally.sentences) > 5  # many ways to be wrong, not one early refusal
    record_property("outcomes", dict(tally.outcomes))


# --- the watch itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda place: 1 / 0, "ZeroDivisionError"),
        (lambda place: (place.base / "a" / "new").write_text("x"), "Elsewhere"),
        (lambda place: os.mkdir(place.base / "x"), "Elsewhere"),
        (lambda place: os.rename(place.base / "a" / "witness", place.out / "w"), "Elsewhere"),
        (lambda place: (place.base / "a" / "witness").chmod(0o600), "changed outside"),
    ],
)
def test_the_watch_sees(read, what, tmp_path):
    outcome, why = fuzz_run.one(lambda rng, place: lambda: read(place), "x", 0, 0, tmp_path)
    assert outcome == "FINDING"
    assert what in why


def test_the_watch_sees_a_link_that_leads_out(tmp_path):
    def make(rng, place):
        (place.out / "link").symlink_to("../..")
        return lambda: (place.out / "link" / "new").write_text("x")

    outcome, why = fuzz_run.one(make, "x", 0, 0, tmp_path)
    assert outcome == "FINDING"
    assert "Elsewhere" in why


def test_the_watch_sees_a_loop_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_run, "SECONDS", 0.1)

    def forever():
        while True:
            pass

    outcome, why = fuzz_run.one(lambda rng, place: forever, "x", 0, 0, tmp_path)
    assert outcome == "FINDING"
    assert "TooLong" in why
