from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from guywire.cli import sweeps
from guywire.lab.training import CompareConfig

DOCUMENT: dict[str, Any] = {
    "sampler": "tpe",
    "metric": "accuracy",
    "seeds": [1000, 1001],
    "not_tuned": ["finetune"],
    "methods": [
        {
            "method": "l2",
            "trials": [{}, {}, {}],
            "chosen": {"strength": 0.1},
            "score": 0.584,
            "edges": {},
        },
        {
            "method": "ewc[x]",
            "trials": [{}],
            "chosen": {"strength": 1.0, "labels": "true"},
            "score": 0.5,
            "edges": {"strength": "low"},
        },
    ],
}


def test_what_was_chosen_is_printed_with_its_edges() -> None:
    screen = Console(file=io.StringIO(), width=120)
    sweeps.show(screen, DOCUMENT)
    text = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for words in (
        "Tuned on validation data (tpe): best accuracy, mean over 2 seeds",
        "strength = 0.1",
        "labels = true",
        "ewc[x]",
        "58.4",
        "strength is the lowest tried",
        "not tuned: finetune",
        "at the edge of what was tried for ewc[x]",
    ):
        assert words in text


def test_trials_of_a_sweep_are_counted_beforehand() -> None:
    made = {"methods": ["finetune", "l2", "ewc"], "sweep": {"points": 4, "seeds": 2}}
    assert sweeps.count(CompareConfig.model_validate(made)) == 2 * 4 * 2
    assert sweeps.count(CompareConfig()) == 0
