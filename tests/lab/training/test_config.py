from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.lab.training.config import CompareConfig, TrialSpec, parse
from guywire.lab.training.tables import to_toml


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epoch": 3}, "unknown key 'epoch': did you mean 'epochs'?"),
        ({"stream": {"task": 3}}, r"unknown key 'task' in \[stream\]: did you mean 'tasks'?"),
        (
            {"evaluation": {"subsets": 3}},
            r"unknown key 'subsets' in \[evaluation\]: did you mean 'subset'",
        ),
        ({"zzzz": 3}, "unknown key 'zzzz': known are batch_size"),
        ({"epochs": "many"}, "epochs = 'many': input should be a valid integer"),
        ({"epochs": 0}, "epochs = 0: input should be greater than or equal to 1"),
        ({"epochs": 1.5}, "epochs = 1.5: "),
        ({"lr": -1}, "lr = -1: input should be greater than 0"),
        ({"lr": float("nan")}, "lr = nan: "),
        ({"lr": float("inf")}, "lr = inf: "),
        ({"loss": "hinge"}, "loss = 'hinge': input should be 'softmax', 'masked' or 'sigmoid'"),
        ({"stream": {"scenario": "x"}}, "stream.scenario = 'x'"),
        ({"stream": 3}, "stream = 3"),
        ({"methods": []}, "methods = .*at least one"),
        ({"methods": ["ewc", "ewc"]}, "methods = .*'ewc' twice"),
        ({"methods": 3}, "methods = 3"),
        ({"seeds": 0}, "seeds = 0: must be at least 1"),
        ({"seeds": [1, 1]}, r"seeds = .*must be different"),
        ({"seeds": "x"}, "seeds = 'x'"),
        ({"evaluation": {"every": 0}}, "evaluation.every = 0: must be 'auto' or at least 1"),
        ({"evaluation": {"every": "x"}}, "evaluation.every = 'x'"),
    ],
)
def test_what_is_wrong_is_one_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse(CompareConfig, values)
    assert "\n" not in str(caught.value)


def test_the_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"^my\.toml: unknown key"):
        parse(CompareConfig, {"a": 1}, "my.toml")


numbers = st.floats(1e-6, 1e3)
configs = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(1, 99),
        "lr": numbers,
        "methods": st.lists(st.sampled_from(["ewc", "l2", "replay"]), min_size=1, unique=True),
        "seeds": st.integers(1, 9) | st.lists(st.integers(0, 9), min_size=1, unique=True),
        "stream": st.fixed_dictionaries({}, optional={"tasks": st.integers(1, 9)}),
        "options": st.dictionaries(
            st.sampled_from(["ewc", "l2"]), st.dictionaries(st.just("strength"), numbers)
        ),
        "evaluation": st.fixed_dictionaries(
            {}, optional={"every": st.just("auto") | st.integers(1, 9), "enabled": st.booleans()}
        ),
    },
)


@given(configs)
def test_settings_survive_the_way_through_a_file(values: dict[str, Any]) -> None:
    config = parse(CompareConfig, values)
    assert parse(CompareConfig, tomllib.loads(to_toml(config))) == config


@given(configs)
def test_trial_specs_survive_json(values: dict[str, Any]) -> None:
    for spec in parse(CompareConfig, values).trials():
        assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec


def test_there_is_one_trial_a_method_and_seed_all_methods_of_a_seed_first() -> None:
    config = CompareConfig(methods=("ewc", "l2"), seeds=(3, 5), seed=9, epochs=7)
    specs = config.trials()
    assert [s.id for s in specs] == ["ewc-seed3", "l2-seed3", "ewc-seed5", "l2-seed5"]
    assert {s.run_seed for s in specs} == {9}
    assert {s.epochs for s in specs} == {7}


def test_methods_may_be_one_word_with_commas() -> None:
    assert parse(CompareConfig, {"methods": "a, b,c"}).methods == ("a", "b", "c")
