from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guywire.cli import settings
from guywire.core.errors import DataError, UsageError
from guywire.lab import streams
from guywire.lab.training.config import CompareConfig
from guywire.lab.training.run import RunFolder

NO_FLAGS: dict[str, Any] = {"stream": {"data": None, "tasks": None}, "lr": None, "out": None}


def run_of(path: Path, **values: Any) -> None:
    config = CompareConfig(**values)
    run = RunFolder(path)
    run.prepare(config, resume=False)
    run.started(["guywire"], config)
    run.describe(config, streams.load(config.stream))


def test_without_anything_there_are_the_defaults() -> None:
    assert settings.settle(None, NO_FLAGS, resume=False) == CompareConfig()


def test_flags_win_over_a_file_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text("lr = 0.5\nepochs = 2\n[stream]\ntasks = 3\nscenario = 'task'\n")
    flags = NO_FLAGS | {"stream": {"data": None, "tasks": "2"}, "lr": "0.25"}
    found = settings.settle(file, flags, resume=False)
    assert (found.lr, found.epochs, found.stream.tasks) == (0.25, 2, 2)
    assert found.stream.scenario == "task"


def test_what_is_wrong_in_a_file_is_told_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text("epoch = 2\n")
    with pytest.raises(UsageError, match=r"study\.toml: unknown key 'epoch'"):
        settings.settle(file, NO_FLAGS | {"lr": "wrong too"}, resume=False)


def test_a_resumed_run_has_its_settings_with_flags_over_them(tmp_path: Path) -> None:
    run_of(tmp_path, methods=("ewc",), epochs=7)
    flags = NO_FLAGS | {"out": str(tmp_path), "workers": "2"}
    found = settings.settle(None, flags, resume=True)
    assert (found.methods, found.epochs, found.workers) == (("ewc",), 7, 2)
    assert settings.settle(None, flags, resume=False).epochs == CompareConfig().epochs


def test_a_resumed_run_may_be_named_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f"epochs = 3\nout = '{tmp_path / 'run'}'\n")
    assert settings.settle(file, NO_FLAGS, resume=True).epochs == 3


def test_there_must_be_a_run_to_resume_or_settings_for_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume needs the folder"):
        settings.settle(None, NO_FLAGS, resume=True)
    flags = NO_FLAGS | {"out": str(tmp_path)}
    with pytest.raises(UsageError, match="there is no run to resume in"):
        settings.settle(None, flags | {"workers": "1"}, resume=True)
    assert settings.settle(None, flags | {"lr": "0.5"}, resume=True).lr == 0.5


def test_a_resumed_run_whose_settings_were_changed_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, methods=("ewc",))
    (tmp_path / "config.toml").write_text("epochs = 99\n")
    with pytest.raises(DataError, match="was changed since the run began"):
        settings.settle(None, NO_FLAGS | {"out": str(tmp_path)}, resume=True)


def test_options_are_toml_values_or_words() -> None:
    words = ["ewc.strength=1000", "ewc.labels=true", "i-lora.layers=['a', 'b']", "a.b.c= x y"]
    assert settings.options(words) == {
        "ewc": {"strength": 1000, "labels": True},
        "i-lora": {"layers": ["a", "b"]},
        "a": {"b": {"c": " x y"}},
    }
    assert settings.options([]) == {}


@pytest.mark.parametrize("word", ["ewc", "ewc=1", "=1", ".x=1", "ewc.=1", "ewc..x=1"])
def test_an_option_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"write METHOD\.OPTION=VALUE"):
        settings.options([word])


def test_resources_go_into_the_table_of_ray() -> None:
    assert settings.resources(None) == {}
    assert settings.resources('{"GPU": 1, "disk": 2}') == {"gpus": 1, "custom": {"disk": 2}}
