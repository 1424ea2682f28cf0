from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.lab.training.config import CompareConfig, parse
from guywire.lab.training.sweep.config import SweepConfig, mask, without_password
from guywire.lab.training.tables import to_toml

URL = "postgresql://ann:s3cr3t@db:5432/sweeps"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampel": "grid"}, r"unknown key 'sampel' in \[sweep\]: did you mean 'sampler'"),
        ({"sampler": "gird"}, "sweep.sampler = 'gird'"),
        ({"trials": 0}, "sweep.trials = 0"),
        ({"points": 1}, "sweep.points = 1"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"metric": "seconds"}, "sweep.metric = 'seconds'"),
        (
            {"storage": "mysql://x/y"},
            "sweep.storage = 'mysql://x/y': must be 'sqlite' or postgresql",
        ),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(CompareConfig, {"sweep": values})


@pytest.mark.parametrize(
    "sweep",
    [
        {"storage": "mysql://ann:s3cr3t@db/x"},
        {"storage": URL, "metrik": 1},
        {"storage": "sqlite", "password": ["s3cr3t"]},
        ["postgresql://ann:s3cr3t@db/x?password=s3cr3t"],
        [{"storage": "sqlite", "password": "s3cr3t"}],
    ],
)
def test_no_password_in_messages(sweep: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse(CompareConfig, {"sweep": sweep})
    assert "s3cr3t" not in str(caught.value)


def test_no_password_in_what_is_written() -> None:
    config = parse(CompareConfig, {"sweep": {"storage": URL}})
    assert config.sweep is not None
    assert config.sweep.password is not None
    assert config.sweep.password.get_secret_value() == "s3cr3t"
    assert config.sweep.storage == "postgresql://ann@db:5432/sweeps"
    for shown in (to_toml(config), repr(config), str(config), config.model_dump_json()):
        assert "s3cr3t" not in shown
    again = config.model_copy(update={"model": "mlp"})
    assert again.sweep is not None
    assert again.sweep.password == config.sweep.password


secrets = st.text(st.characters(codec="utf-8", exclude_characters="&#"), min_size=1, max_size=20)


@settings(max_examples=50)
@given(secret=secrets, user=st.from_regex(r"[a-z]{1,8}", fullmatch=True))
def test_a_password_is_taken_out_of_any_url(secret: str, user: str) -> None:
    for url in (
        f"postgresql://{user}:{quote(secret, safe='')}@host:5/x?sslmode=require",
        f"postgresql://{user}@host:5/x?sslmode=require&password={quote(secret, safe='')}",
    ):
        kept, password = without_password(url)
        assert password == secret
        assert kept == f"postgresql://{user}@host:5/x?sslmode=require"


def test_a_password_with_signs_that_should_have_been_quoted_is_hidden_whole() -> None:
    for url in ("postgresql://ann:p@ss@db/x", "postgresql://ann:p/ss@db/x"):
        assert without_password(url)[0] == "postgresql://ann@db/x"
        assert "ss@" not in mask(url).replace("***@", "")


@given(st.integers(1, 9), st.sets(st.integers(995, 1010), max_size=8))
def test_seeds_are_never_the_comparisons(count: int, taken: set[int]) -> None:
    found = SweepConfig(seeds=count).seed_list(tuple(taken))
    assert len(found) == len(set(found)) == count
    assert not set(found) & taken
