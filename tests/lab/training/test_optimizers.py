from __future__ import annotations

import pytest
import torch
from torch import nn

from guywire.lab.training import optimizers
from guywire.lab.training.config import Training


def test_what_is_given_counts() -> None:
    made = optimizers.make(Training(optimizer="adamw", lr=0.3, weight_decay=0.1), nn.Linear(2, 2))
    assert type(made) is torch.optim.AdamW
    assert made.param_groups[0]["lr"] == 0.3
    assert made.param_groups[0]["weight_decay"] == 0.1


def test_pretrained_models_move_more_slowly() -> None:
    fresh = optimizers.defaults(Training(), "mlp")
    pretrained = optimizers.defaults(Training(), "minilm")
    assert pretrained["lr"] < fresh["lr"]
    assert optimizers.defaults(Training(lr=1.0), "hf:x")["lr"] == 1.0


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_frozen_parameters_are_left_out(kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    made = optimizers.make(Training(optimizer=kind), model)  # type: ignore[arg-type]
    assert sum(p.numel() for g in made.param_groups for p in g["params"]) == 6


def test_weight_decay_is_zero_unless_asked_for() -> None:
    # A decay would pull towards zero what a penalty holds elsewhere; AdamW's own default is 0.01.
    made = optimizers.make(Training(optimizer="adamw"), nn.Linear(2, 2))
    assert made.param_groups[0]["weight_decay"] == 0.0
