"""A study for tests of the machinery: runs in milliseconds, with numbers known beforehand."""

from __future__ import annotations

import torch

from guywire.core.checkpoint import save
from guywire.lab.studies.study import Check, Claim, Plot, Study, Work
from guywire.lab.studies.verdict import Judgement, exceeds

SETTINGS = {"optimum": 20.0, "noise": 0.0, "explode": "", "name": None}


def prepare(work: Work) -> list[dict]:
    save(work.leaves(f"start-{work.seed}.safetensors"), {"x": torch.ones(1) * work.seed})
    return []


def drop(work: Work, *, strength: float = 0.0) -> list[dict]:
    if work.settings["explode"] == work.condition:
        raise RuntimeError("the coin is lost")
    assert (work.folder / f"start-{work.seed}.safetensors").exists()
    torch.rand(1)  # the global generator is the machinery's to seed and to put back
    distance = (torch.tensor(max(strength, 1e-9)).log10() - work.settings["optimum"]).abs().item()
    shift = {"plain": 1.0, "held": 0.0}[work.condition] + 0.01 * work.seed
    rows = [work.row("curve", shift + 1 / (1 + step), step=step) for step in range(3)]
    return [*rows, work.row("valid", shift + distance), work.row("test", shift)]


def run(bench) -> None:
    bench.run(bench.units(prepare, ["start"]))
    if bench.settings["optimum"] < 10:
        choices = bench.choose(drop, {"held": {}}, [0.1, 1.0], metric="valid", widen=3)
        best = {"strength": choices["held"].best}
    else:
        best = {"strength": 1.0}
    bench.run(bench.units(drop, {"plain": {}, "held": best}))


def judge(table) -> Judgement:
    gain = table.difference("plain", "held", "test")
    return Judgement(exceeds(gain, 0.5), f"Held coins fall {gain.words()} further.")


STUDY = Study(
    slug="falling-coin",
    title="On falling coins",
    paper="Nobody, nowhere",
    summary="Drops coins.",
    settings=SETTINGS,
    smoke={"noise": 0.5},
    claims=[Claim("a", "Held coins fall further.", "by 0.5", judge, rests_on=("held",))],
    checks=[Check("coins fall", lambda table: table.mean("held", "test").mean >= 0.0)],
    plots=[
        Plot("Falls", "bars", "test", "metres"),
        Plot("On the way", "curves", "curve", "metres", against="second", log=True),
        Plot("Two tries", "plane", "test", "metres", against="valid", across="metres before"),
        Plot("Never measured", "bars", "luck", "sixes"),
    ],
    run=run,
)
