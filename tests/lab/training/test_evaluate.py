from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guywire.lab import models, streams
from guywire.lab.streams import Stream, StreamConfig
from guywire.lab.training import evaluate
from guywire.lab.training.config import EvaluationConfig


def load(scenario: Any = "class", tasks: int = 3) -> Stream:
    return streams.load(StreamConfig(scenario=scenario, tasks=tasks, classes=6, max_per_class=30))


class Oracle(nn.Module):
    """Logits that say a fixed class for every image: by a table from images to logits."""

    def __init__(self, stream: Stream, wrong_tasks: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.bn = nn.BatchNorm2d(1)
        self.table: dict[bytes, int] = {}
        for i, task in enumerate(stream.tasks):
            for x, y in stream.loader(task.test, 64):
                for image, label in zip(x, y.tolist(), strict=True):
                    said = (label + 1) % classes if i in wrong_tasks else label
                    self.table[image.numpy().tobytes()] = said
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        self.bn(x)
        assert not self.training
        said = [self.table[image.numpy().tobytes()] for image in x]
        return nn.functional.one_hot(torch.tensor(said), self.classes).float() * 5


def test_the_row_says_which_tasks_are_right_and_leaves_those_to_come_out() -> None:
    stream = load()
    model = Oracle(stream, wrong_tasks=(0,), classes=6)
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    row, pooled = evaluate.matrix_row(model, stream, 1)
    assert row == [0.0, 1.0, None]
    sizes = [len(t.test) for t in stream.tasks]
    assert pooled == pytest.approx(sizes[1] / (sizes[0] + sizes[1]))
    assert model.training
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_every_domain_counts_from_the_first_task_on() -> None:
    stream = load()
    domain = dataclasses.replace(stream, scenario="domain")
    row, pooled = evaluate.matrix_row(Oracle(domain, (), 6), domain, 0)
    assert row == [1.0, 1.0, 1.0]
    assert pooled == 1.0


def test_with_the_task_given_a_prediction_stays_within_it() -> None:
    stream = load("task")

    class Biased(nn.Module):  # always says class 0, and among the others the larger number
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([9.0, 1, 2, 3, 4, 5]).expand(len(x), 6)

    row, _ = evaluate.matrix_row(Biased(), stream, 2)
    for index, task in enumerate(stream.tasks):
        said = 0 if index == 0 else max(task.classes)
        assert row[index] == pytest.approx(float((task.test.labels == said).float().mean()))


def monitor(stream: Stream, config: EvaluationConfig, steps: list[int]) -> Any:
    model = models.build("mlp", stream, torch.Generator().manual_seed(0))
    model.grow(2, torch.Generator().manual_seed(0))
    return evaluate.monitor(model, stream, config, steps=steps, batch_size=8, seed_parts=(0, 0))


def test_a_cheap_trial_is_looked_at_at_every_step() -> None:
    watched = monitor(load(), EvaluationConfig(), [5, 5, 5])
    assert watched.every == 1
    assert watched.budget is None


def test_a_dear_trial_keeps_to_its_share() -> None:
    watched = monitor(load(), EvaluationConfig(share=0.1), [10_000_000] * 3)
    assert watched.budget == 0.1


def test_a_given_period_is_taken_at_its_word() -> None:
    assert monitor(load(), EvaluationConfig(every=7), [10_000_000] * 3).every == 7
    assert monitor(load(), EvaluationConfig(enabled=False), [5] * 3) is None


def test_the_part_of_the_test_set_depends_on_the_seed_alone() -> None:
    stream = load()

    def chosen(seed: int) -> Tensor:
        model = models.build("mlp", stream, torch.Generator().manual_seed(0))
        model.grow(2, torch.Generator().manual_seed(0))
        config = EvaluationConfig(subset=4)
        watched = evaluate.monitor(
            model, stream, config, steps=[5] * 3, batch_size=8, seed_parts=(seed, 0)
        )
        assert watched is not None
        return torch.cat([batch[0] for batch in watched._sets._sets["0"]])

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))
    assert len(chosen(1)) == 4


def test_the_summary_follows_its_formulas() -> None:
    stream = load()
    matrix: list[list[float | None]] = [[0.9, None, None], [0.6, 0.8, None], [0.3, 0.5, 0.7]]
    found = evaluate.summary(matrix, 0.55, stream, None)
    assert found["accuracy"] == 0.55
    assert found["average_accuracy"] == pytest.approx(0.5)
    assert found["forgetting"] == pytest.approx((0.6 + 0.3) / 2)
    assert found["backward_transfer"] == pytest.approx(-0.45)
    assert found["forgetting_global"] == pytest.approx(0.225)
    assert found["learning_accuracy"] == pytest.approx(0.8)
    assert found["min_acc"] is None


def test_a_single_task_forgets_nothing_and_says_so() -> None:
    found = evaluate.summary([[0.9]], 0.9, load(tasks=1), None)
    assert found["forgetting"] is None
    assert found["backward_transfer"] is None
    assert found["average_accuracy"] == 0.9
