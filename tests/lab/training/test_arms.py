from __future__ import annotations

import inspect
from typing import Any

import pytest

import guywire as gw
from guywire.core.errors import UsageError
from guywire.core.regularizer import Regularizer
from guywire.lab import streams
from guywire.lab.training import arms
from guywire.lab.training.config import DEFAULT_METHODS, CompareConfig, TrialSpec
from guywire.lab.training.criterion import Criterion
from guywire.lab.training.parts import PARTS


def build(method: str, **options: Any) -> arms.Arm:
    return build_spec(TrialSpec(method=method, options=options))


def build_spec(spec: TrialSpec) -> arms.Arm:
    return arms.build(spec, Criterion(streams.load(spec.stream), spec.loss))


def test_every_public_method_has_a_name() -> None:
    public = {
        name
        for name in gw.__all__
        if inspect.isclass(getattr(gw, name)) and issubclass(getattr(gw, name), Regularizer)
    } - {"Regularizer"}
    assert public == {part.export for part in PARTS.values() if part.export}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_every_method_can_be_built_and_tells_what_it_is(name: str) -> None:
    part = PARTS[name]
    assert part.summary
    assert part.when
    if part.own_loop:
        with pytest.raises(UsageError, match=f"guywire.{part.export} in a loop of your own"):
            build(name)
        return
    arm = build(name)
    assert len(arm.regularizers) == (1 if part.export else 0)
    assert (arm.lora is not None) == part.adapted
    for key in part.defaults:
        assert key in {*inspect.signature(part.cls).parameters, *part.extra}  # type: ignore[arg-type]


def test_the_default_methods_exist() -> None:
    assert set(DEFAULT_METHODS) <= set(PARTS)
    assert len(DEFAULT_METHODS) == 7


def test_baselines_are_flags() -> None:
    assert build("joint").joint
    assert build("frozen").frozen
    assert not build("finetune").regularizers
    frozen = build("frozen+l2")
    assert frozen.frozen
    assert [type(r) for r in frozen.regularizers] == [gw.L2]


def test_the_order_of_a_combination_is_kept() -> None:
    assert [type(r) for r in build("replay+ewc").regularizers] == [gw.Replay, gw.EWC]


def test_options_come_from_the_part_and_win_over_the_table() -> None:
    arm = build("ewc+replay", ewc={"strength": 3}, replay={"capacity": 7})
    assert arm.regularizers[0].strength == 3  # type: ignore[attr-defined]
    assert arm.regularizers[1].capacity == 7  # type: ignore[attr-defined]


def test_a_table_with_a_method_makes_a_name() -> None:
    options = {"ewc": {"strength": 3, "decay": 0.5}, "hard": {"method": "ewc", "strength": 9}}
    arm = build("hard", **options)
    assert arm.regularizers[0].strength == 9  # type: ignore[attr-defined]
    assert arm.regularizers[0].decay == 0.5  # type: ignore[attr-defined]
    both = build("both", both={"method": "ewc+replay", "ewc": {"strength": 4}})
    assert both.regularizers[0].strength == 4  # type: ignore[attr-defined]


def test_strengths_may_differ_by_group() -> None:
    arm = build("l2", l2={"strength": {"head.*": 1, "*": 0.5}})
    assert arm.regularizers[0].strength == {"head.*": 1.0, "*": 0.5}  # type: ignore[attr-defined]


def test_what_a_method_draws_depends_on_the_trial() -> None:
    seeds = {
        build_spec(TrialSpec(method=m, seed=s, run_seed=r)).regularizers[0].seed  # type: ignore[attr-defined]
        for m in ("replay", "replay+l2")
        for s in (0, 1)
        for r in (0, 1)
    }
    assert len(seeds) == 8
    chosen = build("replay", replay={"seed": 5})
    assert chosen.regularizers[0].seed == 5  # type: ignore[attr-defined]


def test_distillation_follows_the_loss() -> None:
    arm = build_spec(TrialSpec(method="lwf", loss="sigmoid"))
    assert arm.regularizers[0].kind == "sigmoid"  # type: ignore[attr-defined]
    assert arms.distils_by_sigmoid(arm)
    assert not arms.distils_by_sigmoid(build("lwf"))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("ewcc", {}, "there is no method 'ewcc': did you mean 'ewc'?"),
        ("xyz", {}, "there is no method 'xyz': known are adamr, "),
        ("ewc+ewc", {}, "names one method twice"),
        ("joint+ewc", {}, "'joint' stands alone"),
        ("finetune+l2", {}, "'finetune' stands alone"),
        ("../ewc", {}, "cannot name a method"),
        ("", {}, "cannot name a method"),
        ("ewc+", {}, "there is no method ''"),
        ("ewc", {"ewc": {"strenth": 1}}, r"unknown key 'strenth' in \[options.ewc\]: did you mean"),
        ("ewc", {"ewc": {"strength": "hard"}}, "options.ewc.strength = 'hard'"),
        ("ewc", {"ewc": {"labels": "all"}}, "options.ewc.labels = 'all'"),
        ("replay", {"replay": {"criterion": 1}}, "unknown key 'criterion'"),
        ("finetune", {"finetune": {"a": 1}}, "'finetune' has no option 'a'"),
        ("x", {"x": {"method": 3}}, "options.x.method = 3"),
        (
            "x",
            {"x": {"method": "ewc+l2", "strength": 3}},
            r"unknown key 'strength' in \[options.x\]",
        ),
        (
            "ewc",
            {"replay": {"capacity": 3}},
            r"\[options.replay\] belongs to none of the methods ewc",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        arms.check(CompareConfig(methods=(method,), options=options))


def test_the_word_true_may_stand_unquoted_where_it_is_a_choice() -> None:
    (regularizer,) = build("ewc", ewc={"labels": True, "decoupled": True}).regularizers
    assert regularizer.labels == "true"  # type: ignore[attr-defined]
    assert regularizer.decoupled is True  # type: ignore[attr-defined]
