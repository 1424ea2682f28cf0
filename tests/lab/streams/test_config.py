from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest
from pydantic import ValidationError

from guywire.lab.streams import StreamConfig, data_folder


def test_unknown_keys_and_odd_values_are_refused():
    for wrong in (
        {"dta": "digits"},
        {"scenario": "classes"},
        {"tasks": 0},
        {"tasks": "many"},
        {"test_fraction": 0.0},
        {"test_fraction": 1.0},
        {"valid_fraction": -0.1},
        {"class_order": "random"},
        {"classes": 1},
        {"image_size": 0},
        {"seed": -1},
    ):
        with pytest.raises(ValidationError):
            StreamConfig(**wrong)


def test_it_survives_json_and_is_frozen():
    config = StreamConfig(data="mnist", tasks=3, classes=6, seed=4)
    assert StreamConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        config.seed = 5


def test_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GUYWIRE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    for unset in (None, ""):
        if unset is None:
            monkeypatch.delenv("GUYWIRE_DATA")
        else:
            monkeypatch.setenv("GUYWIRE_DATA", unset)
        assert data_folder() == Path(platformdirs.user_data_dir("guywire"))
