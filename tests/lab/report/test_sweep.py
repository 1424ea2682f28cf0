from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guywire.core.errors import DataError
from guywire.lab.report import render
from guywire.lab.report.figures import Dose, Response, responses

BEHAVIOUR = {"l2": (0.3, 0.42, 0.9, 4.6, 0.4), "replay": (0.5, 0.8, 0.9, 8.0, 0.1)}


def test_the_section_has_curves_numbers_and_a_warning(
    make_run: Callable[..., Path], swept: dict[str, Any]
) -> None:
    run = make_run(behaviour=BEHAVIOUR, seeds=2, tasks=3)
    assert 'id="sweep"' not in render(run).read_text()
    (run / "sweep.json").write_text(json.dumps(swept))
    html = render(run).read_text()
    section = html[html.index('<section id="sweep"') :]
    section = section[: section.index("</section>")]
    assert section.count('class="plot response') == 3
    assert "For replay the best value is at the edge" in section
    assert "Not tuned: finetune." in section
    assert "capacity: the highest tried" in section
    assert "diverged with 1 of 2 seeds" in section
    assert "<b>" not in section
    label = re.search(r'aria-label="(l2: accuracy and forgetting[^"]*)"', section)
    assert label is not None
    assert "Chosen: 1000 (accuracy 66.0%, forgetting 17.0%)." in label[1]
    # Two seeds, four known values, two measures; a line each; the fifth value is a cross.
    panel = section[section.index(label[1]) :]
    panel = panel[: panel.index("</svg>")]
    assert panel.count('class="dot"') == 16
    assert panel.count("×") == 1
    assert panel.count('class="main"') == panel.count('class="main dashed"') == 1
    assert panel.count('class="chosen"') == 1


def test_a_logarithmic_axis_is_even_in_decades() -> None:
    doses = [Dose(v, [0.5], [0.1], v == 10) for v in (0.1, 1, 10, 100)]
    drawn = responses([Response("l2", "strength", 0, doses, True, True, "", "words")])
    moves = re.search(r'd="M[\d.]+ [\d.]+l([^"]*)" class="main"', str(drawn))
    assert moves is not None
    steps = [float(x) for x in moves[1].replace("-", " ").split()[::2]]
    assert len(steps) == 3
    assert max(steps) - min(steps) < 0.21


@pytest.mark.parametrize("damage", [{"methods": 3}, {"methods": [{}]}, {"seeds": None}])
def test_a_damaged_file_is_named(
    make_run: Callable[..., Path], swept: dict[str, Any], damage: dict[str, Any]
) -> None:
    run = make_run(behaviour=BEHAVIOUR, seeds=1, tasks=2)
    (run / "sweep.json").write_text(json.dumps(swept | damage))
    with pytest.raises(DataError, match=r"sweep\.json of the run 'run'"):
        render(run)
