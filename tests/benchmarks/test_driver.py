from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


FAKE = """
import sys
sys.path.insert(0, {sides!r})
from protocol import serve, versions

def prepare(given):
    print("a library prints this")
    if given.get("fail"):
        raise ImportError("no module named peer in /some/where/else")
    counts = dict(a=0)
    def slow():
        counts["a"] += 1
        return dict(seconds=given["seconds"] * counts["a"], bytes=7)
    def base():
        print("and this")
        return dict(seconds=0.5)
    def breaks():
        raise NotImplementedError("takes no dicts")
    def dies():
        import os; os._exit(3)
    def hangs():
        import time; time.sleep(60)
    return dict(slow=slow, base=base, breaks=breaks, dies=dies, hangs=hangs), dict(versions=versions("pip"))

serve(prepare)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(sides=str(ROOT / "benchmarks" / "sides")))

    def start(**given):
        timeout = given.pop("timeout", 30)
        return module("driver").Side(sys.executable, script, given, timeout=timeout)

    return start


def test_two_sides_take_turns_and_ratios_are_within_repetitions(fake):
    d = module("driver")
    ours, peer = fake(seconds=1.0), fake(seconds=4.0)
    try:
        assert ours.about == {"versions": peer.about["versions"]}
        answers, out = d.alternate({"ours": ours, "peer": peer}, 3, ["base", "slow"])
    finally:
        ours.close()
        peer.close()
    assert not out
    row = d.row(
        answers, out, "g", "f", "bases", d.Cost("ours", "slow", "base"), "Peer",
        d.Cost("peer", "slow", "base"), limit=3.0,
    )  # fmt: skip
    # the fake's seconds grow 1, 2, 3: medians 2 and 8 over 0.5, the ratio is the same every time
    assert row.ours["each"] == [2.0, 4.0, 6.0]
    assert row.theirs["each"] == [8.0, 16.0, 24.0]
    assert row.ratio == {"median": 0.25, "low": 0.25, "high": 0.25, "each": [0.25] * 3}
    assert row.verdict == "we win; limit 3 missed"
    assert d.Cost("ours", "slow", key="bytes").read(answers) == [7.0] * 3


def test_what_breaks_dies_or_hangs_drops_out_and_says_why(fake):
    d = module("driver")
    with pytest.raises(d.SideFailed, match="ImportError: no module named peer in else"):
        fake(fail=True)
    dying, hanging = fake(seconds=1.0), fake(seconds=1.0, timeout=0.3)
    try:
        answers, out = d.alternate(
            {"dying": dying, "hanging": hanging}, 2, ["breaks", "slow", "dies", "hangs"]
        )
    finally:
        dying.close()
        hanging.close()
    assert out["dying/breaks"] == "NotImplementedError: takes no dicts"
    assert out["dying"] == "ended with code 3 before it answered"
    assert hanging.child.poll() is not None
    assert len(answers["dying"]["slow"]) == 1  # of the first round
    row = d.row(
        answers, out, "g", "f", "s", d.Cost("dying", "slow"), "P", d.Cost("dying", "breaks")
    )
    assert row.verdict == "not measured: ended with code 3 before it answered"
    assert row.ratio is None


def test_a_side_that_does_not_answer(fake):
    d = module("driver")
    side = fake(seconds=1.0, timeout=0.2)
    with pytest.raises(d.SideFailed, match=r"no answer in 0\.2 s"):
        side.run("hangs")
    side.close()
    assert side.child.returncode < 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.5, 0.6, 0.9), "we win"),
        ((1.1, 1.2, 3.0), "we lose"),
        ((0.9, 1.2, 3.0), "we lose in the median; the spread reaches 1"),
        ((0.5, 0.9, 1.2), "we win in the median; the spread reaches 1"),
        ((0.9, 1.0, 1.2), "even"),
        ((1.0, 1.0, 1.0), "even"),
    ],
)
def test_verdicts(values, words):
    d = module("driver")
    assert d.verdict(d.spread(values)) == words


def test_medians_and_ratios():
    d = module("driver")
    assert d.spread([4.0, 1.0, 2.0, 3.0])["median"] == 2.5
    found = d.ratio([1.0, 9.0, 4.0], [2.0, 3.0, 4.0])
    # the median of ratios, not the ratio of medians (4/3)
    assert (found["median"], found["low"], found["high"]) == (1.0, 0.5, 3.0)


def test_an_environment_is_made_once_and_a_failing_one_says_why(tmp_path):
    e = module("environments")
    peers, home, ran = tmp_path / "peers", tmp_path / "home", []
    peers.mkdir()
    (peers / "peer.txt").write_text("peer==1\n")

    def run(words):
        ran.append(words)
        if "venv" in words:
            python = Path(words[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()

    made = e.environment("peer", home=home, peers=peers, run=run)
    assert made == home / "peer" / "bin" / "python"
    assert ran[1][-2:] == ["-r", str(peers / "peer.txt")]
    assert e.environment("peer", home=home, peers=peers, run=run) == made
    assert len(ran) == 2
    (peers / "peer.txt").write_text("peer==2\n")
    e.environment("peer", home=home, peers=peers, run=run)
    assert len(ran) == 4

    def fails(words):
        e._run([sys.executable, "-c", "import sys; sys.exit('ERROR: No matching distribution')"])

    for how in (fails, run):  # the second time it is not even tried
        with pytest.raises(e.EnvironmentFailed, match="No matching distribution"):
            e.environment("peer", home=tmp_path / "other", peers=peers, run=how)
    with pytest.raises(e.EnvironmentFailed, match=r"nobody\.txt"):
        e.environment("nobody", home=home, peers=peers)


def test_a_failing_environment_leaves_lines_that_say_so(monkeypatch):
    c, d, e = module("comparisons"), module("driver"), module("environments")

    class Ours:
        things = ("plain", "ewc1", "ewc3", "ewc10")

        def __init__(self, *words, **more):
            self.about = {"versions": {"guywire": "1"}, "parameters": 10}

        def run(self, thing):
            return {"seconds": 1.0 if thing == "plain" else 1.5, "held_bytes": 80}

        def close(self):
            pass

    def environment(name):
        raise e.EnvironmentFailed("pip failed: no room")

    monkeypatch.setattr(c, "Side", Ours)
    monkeypatch.setattr(c, "environment", environment)
    plan = c.Plan(quick=True, repeats=5)
    rows = c.ewc(plan)
    assert {r.verdict for r in rows} == {"not measured: pip failed: no room"}
    assert rows[0].ours["median"] == 1.5
    assert rows[0].theirs is None
    assert plan.versions == {"guywire": {"guywire": "1"}}
    _, series = module("growth").tasks(plan)
    assert [p[:2] for p in series[0]["lines"]["Guywire"]] == [[1, 1.5], [3, 1.5], [10, 1.5]]
    assert series[1]["lines"]["Guywire"][0][1] == 2.0  # anchor and importance
    assert series[0]["missing"] == {"Avalanche": "not measured"}
    assert isinstance(rows[0], d.Row)


def results(tmp_path):
    """A run's JSON as ``measure`` makes it, without running anything."""
    main, d = module("__main__"), module("driver")
    plan = module("comparisons").Plan(quick=True)
    found = main.measure([], plan)
    lose = d.ratio([3.0, 3.3], [2.0, 2.0])
    rows = [
        d.Row("ewc", "step", "plain steps", "Avalanche", d.spread([3.0, 3.3]), d.spread([2.0, 2.0]),
              lose, None, d.verdict(lose), "each over its own"),
        d.Row("penalty", "pull", "copies", "one copy", d.spread([2.0]), None, None, 2.9,
              d.verdict(None, {"median": 2.0}, 2.9)),
    ]  # fmt: skip
    found["rows"] = [dataclasses.asdict(r) for r in rows]
    found["growth"] = [
        {"title": "A <step>", "name": "growth-tasks", "x": "tasks", "y": "times", "log": ["x", "y"],
         "lines": {"Guywire": [[1, 1.0, 0.9, 1.1], [50, 1.0, 0.9, 1.2]], "Avalanche": []},
         "missing": {"Avalanche": "no room"}},
    ]  # fmt: skip
    return found


def test_json_table_and_figures(tmp_path):
    main = module("__main__")
    found = results(tmp_path)
    assert main.write(found, tmp_path / "out") == ["growth-tasks"]
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(read) >= {
        "format",
        "date",
        "quick",
        "repeats",
        "threads",
        "machine",
        "versions",
        "rows",
    }
    assert set(read["machine"]) == {"cores", "processor", "memory_gb", "system", "python"}
    assert read["versions"]["ours"]["torch"]
    assert read["rows"][0]["ours"]["each"] == [3.0, 3.3]
    text = json.dumps(read)
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    picture = (tmp_path / "out" / "growth-tasks.svg").read_text()
    root = ET.fromstring(picture)
    assert "Avalanche: not measured" in picture
    dots = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 2
    left, right = (float(c.get("cx")) for c in dots)
    assert left < right
    assert dots[0].get("cy") == dots[1].get("cy")


def test_the_page_says_where_we_lose_and_is_renewed_in_place(tmp_path):
    page = module("page")
    found = results(tmp_path)
    text = page.section(found, ["growth-tasks"])
    assert "**Where we lose**" in text
    assert "step, beside Avalanche, at 1.57 times its cost: we lose (each over its own)." in text
    assert "| pull | 2.00 copies | one copy | – | limit 2.9 kept |" in text
    assert "quick sizes" in text
    assert "![A <step>](_static/growth-tasks.svg)" in text
    file = tmp_path / "costs.md"
    file.write_text(
        "# What it costs\n\n## Memory\n\nkept\n\n## Time, beside peers\n\n## After\n\nkept too\n"
    )
    page.put(file, text)
    once = file.read_text()
    assert once.index("kept\n") < once.index(page.START) < once.index("## After")
    page.put(file, text.replace("1.57", "1.99"))
    again = file.read_text()
    assert again == once.replace("1.57", "1.99")


def test_no_losses_are_said_to_be_none(tmp_path):
    page = module("page")
    found = results(tmp_path)
    found["rows"] = found["rows"][1:]
    assert "No line says that we lose." in page.section(found)


def test_words_of_the_command(capsys):
    main = module("__main__")
    assert main.main(["--list"]) == 0
    named = capsys.readouterr().out.split()
    assert {"ewc", "fisher", "merging", "lora", "replay", "importing", "penalty", "tasks"} <= set(
        named
    )
    with pytest.raises(SystemExit):
        main.main(["--quick", "--only", "ewcc"])
    assert re.search(r"no benchmark 'ewcc'; there are .*ewc", capsys.readouterr().err)


def test_every_peer_has_pinned_requirements():
    e = module("environments")
    for name in e.NAMES:
        lines = (e.PEERS / f"{name}.txt").read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
