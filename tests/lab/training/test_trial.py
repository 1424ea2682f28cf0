from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import CheckpointError, DataError, NonFiniteError
from guywire.lab import models, streams
from guywire.lab.streams import Split, Stream
from guywire.lab.training import trial as trials
from guywire.lab.training.config import TrialSpec
from guywire.lab.training.parts import PARTS
from guywire.lab.training.record import weights_hash
from guywire.lab.training.trial import Trial, run_trial

SMALL: dict[str, Any] = {
    "stream": {"tasks": 3, "classes": 6, "max_per_class": 40, "test_fraction": 0.3},
    "epochs": 2,
    "batch_size": 16,
}


def spec(**changes: Any) -> TrialSpec:
    return TrialSpec.model_validate({**SMALL, **changes})


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """Drop what a clock measured."""
    result = json.loads(json.dumps(result))
    for table in (result, result["metrics"], result["evaluation"]):
        for key in ("seconds", "share"):
            table.pop(key, None)
    return result


def curves(directory: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(directory / "metrics.parquet").to_pylist()


def test_a_trial_leaves_what_the_design_says(tmp_path: Path) -> None:
    result = run_trial(spec(method="ewc"), tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"state.safetensors", "progress.json", "metrics.parquet", "result.json"}
    assert json.loads((tmp_path / "result.json").read_text()) == result
    matrix = result["accuracy_matrix"]
    assert [[v is not None for v in row] for row in matrix] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert result["method"] == "ewc"
    assert result["seed"] == 0
    assert result["metrics"]["seconds"] == result["seconds"] > 0
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["step"] == progress["total"] == result["steps"]
    rows = curves(tmp_path)
    losses = [r for r in rows if r["metric"] == "loss"]
    assert [r["step"] for r in losses] == list(range(1, result["steps"] + 1))
    assert {r["evaluated"] for r in losses} == {-1}
    looked = [r for r in rows if r["metric"] == "accuracy"]
    assert {(r["task"], r["evaluated"]) for r in looked} == {
        (t, e) for t in range(3) for e in range(t + 1)
    }
    final = {r["evaluated"]: r["value"] for r in looked if r["step"] == result["steps"]}
    assert [final[i] for i in range(3)] == pytest.approx(
        matrix[-1]
    )  # the subset is the whole set here
    assert result["evaluation"]["subset"] == [len(t.test) for t in load_stream().tasks]


def load_stream(**changes: Any) -> Stream:
    return models.prepare("mlp", streams.load(spec(**changes).stream))


def test_the_state_at_the_end_is_the_trained_model(tmp_path: Path) -> None:
    result = run_trial(spec(), tmp_path)
    state = checkpoint.load(tmp_path / "state.safetensors")
    model = models.build("mlp", load_stream(), torch.Generator().manual_seed(0))
    for _ in range(3):
        model.grow(2, torch.Generator().manual_seed(0))
    model.load_state_dict(state["model"])
    assert weights_hash(model) == result["weights_sha256"]


def test_a_trial_is_a_pure_function_of_its_spec(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = run_trial(spec(method="replay"), tmp_path / "a")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = run_trial(spec(method="replay"), tmp_path / "b")
    assert timeless(first) == timeless(second)
    assert torch.equal(torch.get_rng_state(), state)
    other = run_trial(spec(method="replay", seed=1), tmp_path / "c")
    assert other["weights_sha256"] != first["weights_sha256"]


def test_methods_of_one_seed_start_alike(tmp_path: Path) -> None:
    for method in ("finetune", "ewc", "replay"):
        run_trial(spec(method=method), tmp_path / method)
    first = [
        [r["value"] for r in curves(tmp_path / m) if r["metric"] == "loss" and r["task"] == 0]
        for m in ("finetune", "ewc")
    ]
    assert first[0] == first[1]


def test_the_plain_loop_is_what_anyone_would_write(tmp_path: Path) -> None:
    s = spec(optimizer="adam", lr=1e-2, loss="softmax")
    result = run_trial(s, tmp_path)
    stream = load_stream()
    made = Trial(s, tmp_path, stream)
    model = models.build("mlp", stream, made._generator("init"))
    for t, task in enumerate(stream.tasks):
        purpose = ("head", t)
        model.grow(len(task.classes), made._generator(*purpose))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for epoch in range(s.epochs):
            for x, y in stream.batches(task.train, 16, made._generator("order", t, epoch)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    assert weights_hash(model) == result["weights_sha256"]


def test_zero_strength_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    plain = run_trial(spec(), tmp_path / "plain")["weights_sha256"]
    for method in ("l2", "l1", "ewc", "lwf", "feature-distillation", "replay"):
        held = run_trial(
            spec(method=method, options={method: {"strength": 0.0}}), tmp_path / method
        )
        assert held["weights_sha256"] == plain, method


def test_looking_changes_nothing(tmp_path: Path) -> None:
    watched = run_trial(spec(method="replay"), tmp_path / "a")
    blind = run_trial(spec(method="replay", evaluation={"enabled": False}), tmp_path / "b")
    assert watched["weights_sha256"] == blind["weights_sha256"]
    assert watched["accuracy_matrix"] == blind["accuracy_matrix"]
    assert blind["metrics"]["min_acc"] is None
    assert 0 < watched["evaluation"]["share"] < 1


def test_joint_training_is_a_ceiling(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 8, "evaluation": {"enabled": False}}
    joint = run_trial(spec(method="joint", **changes), tmp_path / "j")["metrics"]["accuracy"]
    others = [
        run_trial(spec(method=m, **changes), tmp_path / m)["metrics"]["accuracy"]
        for m in ("finetune", "l2", "replay")
    ]
    assert joint > max(others)
    assert joint > 0.8


def test_a_frozen_backbone_stays_where_the_first_task_left_it(tmp_path: Path) -> None:
    one = spec(method="frozen", loss="softmax")  # the masked loss would leave old head blocks too
    run_trial(one, tmp_path / "three")
    stream = load_stream()
    first_only = dataclasses.replace(stream, tasks=stream.tasks[:1])
    run_trial(one, tmp_path / "one", stream=first_only)
    states = [
        checkpoint.load(tmp_path / d / "state.safetensors")["model"] for d in ("three", "one")
    ]
    backbone = [k for k in states[1] if k.startswith("backbone.")]
    assert backbone
    assert all(torch.equal(states[0][k], states[1][k]) for k in backbone)
    assert not torch.equal(states[0]["head.blocks.0.weight"], states[1]["head.blocks.0.weight"])


def test_held_memory_is_counted(tmp_path: Path) -> None:
    found = {
        m: run_trial(spec(method=m, evaluation={"enabled": False}), tmp_path / m)
        for m in ("finetune", "l2", "ewc", "joint")
    }
    weights = 4 * found["l2"]["parameters"] / 1e6
    assert found["finetune"]["extra_memory_mb"] == 0
    assert found["l2"]["extra_memory_mb"] == pytest.approx(weights, rel=0.01)
    assert found["ewc"]["extra_memory_mb"] == pytest.approx(2 * weights, rel=0.01)
    pixels = sum(64 * len(t.train) for t in load_stream().tasks[:2])
    assert found["joint"]["extra_memory_mb"] == pytest.approx(pixels / 1e6)


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_other_scenarios_run(tmp_path: Path, scenario: str) -> None:
    stream = load_stream()
    if scenario == "task":
        result = run_trial(
            spec(method="ewc", stream={**SMALL["stream"], "scenario": "task"}), tmp_path
        )
        assert result["accuracy_matrix"][0][1:] == [None, None]
        assert result["metrics"]["accuracy"] > 0.6  # the task is given: two classes each
        return
    everything = tuple(range(6))
    whole = stream.tasks[0]
    for other in stream.tasks[1:]:
        whole = dataclasses.replace(
            whole, train=whole.train.concat(other.train), test=whole.test.concat(other.test)
        )
    turned = Split(whole.train.inputs.flip(-1), whole.train.labels)  # type: ignore[union-attr]
    tasks = (
        dataclasses.replace(whole, name="plain", classes=everything),
        dataclasses.replace(whole, name="mirrored", classes=everything, train=turned),
    )
    domain = dataclasses.replace(stream, scenario="domain", tasks=tasks)
    result = run_trial(spec(method="l2"), tmp_path, stream=domain)
    assert all(v is not None for row in result["accuracy_matrix"] for v in row)
    assert result["steps"] == 2 * 2 * math.ceil(len(turned) / 16)


class Stop(Exception):
    pass


def interrupted(s: TrialSpec, directory: Path, seed: int) -> tuple[dict[str, Any], int]:
    """Run a trial that is cut off at random steps and resumed until it is through."""
    draw = random.Random(seed)
    plain = Trial._after_step
    stops = 0
    while True:
        left = draw.randint(1, 12)

        def cut(self: Trial) -> None:
            nonlocal left
            plain(self)
            left -= 1
            if left == 0:
                raise Stop

        Trial._after_step = cut  # type: ignore[method-assign]
        try:
            return run_trial(s, directory, resume=True), stops
        except Stop:
            stops += 1
        finally:
            Trial._after_step = plain  # type: ignore[method-assign]


# (Methods for pretrained transformers have the same test in test_adapters.)
ANYWHERE = [n for n, p in sorted(PARTS.items()) if not (p.own_loop or p.adapted or n == "hft")]


@pytest.mark.parametrize("method", [*ANYWHERE, "ewc+replay", "lwf+feature-distillation"])
def test_cut_off_and_resumed_equals_never_stopped(tmp_path: Path, method: str) -> None:
    s = spec(method=method, optimizer="adam", checkpoint={"steps": 4})
    whole = run_trial(s, tmp_path / "whole")
    pieces, stops = interrupted(s, tmp_path / "pieces", seed=len(method))
    assert stops >= 2
    assert timeless(pieces) == timeless(whole)
    assert curves(tmp_path / "pieces") == curves(tmp_path / "whole")


def test_the_clock_decides_only_when_states_are_saved(tmp_path: Path) -> None:
    often = run_trial(spec(method="l2", checkpoint={"seconds": 1e-9}), tmp_path / "a")
    never = run_trial(spec(method="l2"), tmp_path / "b")
    assert timeless(often) == timeless(never)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    s = spec(method="ewc+replay", epochs=12, checkpoint={"steps": 3})
    whole = run_trial(s, tmp_path / "whole")
    draw = random.Random(0)
    directory = tmp_path / "killed"
    kills = 0
    began = time.monotonic()
    while not (directory / "result.json").exists():
        child = os.fork()
        if child == 0:  # a fork shares the imports, so that kills fall into the work
            try:
                run_trial(s, directory, resume=True)
            finally:
                os._exit(0)
        # Later and later, or a machine under load would never get anywhere.
        time.sleep(draw.uniform(0.02, 0.15) * (1 + kills / 8))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert time.monotonic() - began < 60
    assert kills >= 3
    pieces = run_trial(s, directory, resume=True)
    assert timeless(pieces) == timeless(whole)
    assert curves(directory) == curves(tmp_path / "whole")
    assert not list(directory.glob(".*"))


def test_a_finished_trial_is_read_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_trial(spec(), tmp_path)
    monkeypatch.setattr(trials, "Trial", None)
    assert run_trial(spec(), tmp_path, resume=True) == first


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    run_trial(spec(), tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(CheckpointError, match="trial with other settings"):
        run_trial(spec(lr=0.01), tmp_path, resume=True)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    run_trial(spec(), tmp_path)
    (tmp_path / "result.json").unlink()
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        run_trial(spec(), tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_trial_and_keeps_the_last_good_state(
    tmp_path: Path,
) -> None:
    # EWC's pull at such a strength overshoots: the first task is fine, the second blows up.
    s = spec(
        method="ewc",
        optimizer="sgd",
        options={"ewc": {"strength": 1e12}},
        checkpoint={"steps": 1},
    )
    with pytest.raises(NonFiniteError, match=r"ewc-seed0: .* step \d+ .*lower --lr"):
        run_trial(s, tmp_path)
    state = checkpoint.load(tmp_path / "state.safetensors")
    assert state["position"][3] > 0
    assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())
    assert not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    made = Trial(spec(), tmp_path, load_stream())
    with torch.no_grad():
        next(made.model.parameters())[0] = math.inf
    with pytest.raises(NonFiniteError, match="NaN or infinite after step 0"):
        made.save()
    assert not list(tmp_path.iterdir())


def emptied(stream: Stream, part: str) -> Stream:
    empty = stream.tasks[1].train.subset([])
    tasks = list(stream.tasks)
    tasks[1] = dataclasses.replace(tasks[1], **{part: empty})
    return dataclasses.replace(stream, tasks=tuple(tasks))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_task_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(DataError, match=f"task 1 .* has no {part} samples"):
        run_trial(spec(), tmp_path, stream=emptied(load_stream(), part))


def test_a_label_outside_the_task_is_named(tmp_path: Path) -> None:
    stream = load_stream()
    task = stream.tasks[1]
    strange = Split(task.train.inputs, torch.full_like(task.train.labels, 5))
    tasks = (stream.tasks[0], dataclasses.replace(task, train=strange), stream.tasks[2])
    with pytest.raises(DataError, match=r"task 1 .* train labels \[5\]"):
        run_trial(spec(), tmp_path, stream=dataclasses.replace(stream, tasks=tasks))


def test_with_the_task_given_importances_are_those_of_the_task(tmp_path: Path) -> None:
    s = spec(method="ewc", stream={**SMALL["stream"], "scenario": "task"})
    made = Trial(s, tmp_path, load_stream(stream=s.stream.model_dump()))
    made.run()
    ewc = made.arm.regularizers[0]
    assert isinstance(ewc, gw.EWC)
    # Block 0 was out of bounds in the tasks 1 and 2: its importances come from task 0 alone.
    alone = Trial(s, tmp_path, load_stream(stream=s.stream.model_dump()))
    alone._begin(0)
    alone._train(0)
    alone._end(0)
    first = alone.arm.regularizers[0]
    assert isinstance(first, gw.EWC)
    name = "head.blocks.0.weight"
    assert torch.equal(ewc.precision_[name], first.precision_[name])


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".state.safetensors.1.tmp").write_bytes(b"half")
    run_trial(spec(epochs=1), tmp_path)
    assert not list(tmp_path.glob(".*"))
