"""The report of a run that the training half really made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guywire.lab.report import render
from guywire.lab.training.compare import compare
from guywire.lab.training.config import CompareConfig

TablesOf = Callable[[str], dict[str, list[list[str]]]]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory):
    """Two methods, two seeds, one epoch of digits, in this process."""
    folder = tmp_path_factory.mktemp("real") / "run"
    config = CompareConfig(
        methods=("finetune", "replay"), seeds=2, epochs=1, workers=0, out=str(folder)
    )
    return compare(config, command=("guywire", "compare", "--epochs", "1"))


def test_the_page_says_what_the_comparison_found(comparison, tables_of: TablesOf) -> None:
    html = render(Path(comparison.folder)).read_text(encoding="utf-8")
    tables = tables_of(html)
    table = tables["Mean over seeds, with its 95% interval (Student's t) below"]
    found = {row[0]: row for row in table[1:]}
    assert set(found) == {"finetune", "replay"}
    for entry in comparison.table:
        row = found[entry["method"]]
        for column, metric in ((1, "accuracy"), (2, "forgetting")):
            mean = float(row[column].split("|")[0])
            assert mean == pytest.approx(100 * entry[metric]["mean"], abs=0.0501)
        assert row[-1] == "2"
    assert 'role="note"' not in html
    assert html.count("data:image/png;base64,") == 5
    assert "guywire compare --epochs 1" in html
    assert html.count('class="main"') == 2 * 6  # a mean for five tasks and for the tasks seen
    assert sum(name.endswith("per cent") for name in tables) == 2
