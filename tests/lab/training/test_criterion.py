from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from guywire.lab.streams import Split, Stream, Task
from guywire.lab.training.criterion import Criterion, per_task_mask


def stream(scenario: Any) -> Stream:
    def task(name: str, classes: tuple[int, ...]) -> Task:
        labels = torch.tensor(classes)
        split = Split(torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8), labels)
        return Task(name, classes, split, split, split)

    groups = [(0, 1), (2, 3, 4)] if scenario != "domain" else [(0, 1, 2, 3, 4)] * 2
    tasks = tuple(task(f"t{i}", g) for i, g in enumerate(groups))
    return Stream("s", scenario, "image", tasks, tuple("abcde"))


@pytest.fixture
def logits() -> Tensor:
    made = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return made.requires_grad_()


LABELS = torch.tensor([2, 3, 4, 2, 3, 4])


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    targets = functional.one_hot(labels, logits.shape[1]).to(logits)
    p = logits.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()


def made(scenario: str, loss: Any, **suit: bool) -> Criterion:
    criterion = Criterion(stream(scenario), loss)
    criterion.suit(**{"joint": False, "distilled": False, **suit})
    criterion.begin(1)
    return criterion


def test_softmax_is_over_all_classes_so_far(logits: Tensor) -> None:
    expected = functional.cross_entropy(logits, LABELS)
    for scenario in ("class", "domain"):
        assert torch.allclose(made(scenario, "softmax")(logits, LABELS), expected)


@pytest.mark.parametrize(
    ("scenario", "loss"), [("class", "masked"), ("task", "softmax"), ("task", "masked")]
)
def test_within_the_task_other_classes_get_no_gradient(
    logits: Tensor, scenario: str, loss: str
) -> None:
    value = made(scenario, loss)(logits, LABELS)
    assert torch.allclose(value, functional.cross_entropy(logits[:, 2:], LABELS - 2))
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient[:, :2], torch.zeros(6, 2, dtype=torch.float64))
    assert bool((gradient[:, 2:] != 0).all())


def test_sigmoid_is_summed_over_classes(logits: Tensor) -> None:
    assert torch.allclose(made("class", "sigmoid")(logits, LABELS), bce(logits, LABELS))
    within = made("task", "sigmoid")(logits, LABELS)
    assert torch.allclose(within, bce(logits[:, 2:], LABELS - 2))


def test_with_sigmoid_distillation_new_classes_only(logits: Tensor) -> None:
    value = made("class", "sigmoid", distilled=True)(logits, LABELS)
    assert torch.allclose(value, bce(logits[:, 2:], LABELS - 2))
    softmax = made("class", "softmax", distilled=True)(logits, LABELS)
    assert torch.allclose(softmax, functional.cross_entropy(logits, LABELS))


def test_joint_training_is_never_masked(logits: Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    value = made("class", "masked", joint=True)(logits, labels)
    assert torch.allclose(value, functional.cross_entropy(logits, labels))


def test_a_replayed_sample_stays_within_its_own_task(logits: Tensor) -> None:
    labels = torch.tensor([0, 1, 0, 2, 3, 4])
    value = made("task", "softmax").replayed(logits, labels)
    first = functional.cross_entropy(logits[:3, :2], labels[:3])
    second = functional.cross_entropy(logits[3:, 2:], labels[3:] - 2)
    assert torch.allclose(value, (first + second) / 2)
    masked = made("class", "masked").replayed(logits, labels)
    assert torch.allclose(masked, functional.cross_entropy(logits, labels))


def test_batches_and_model_outputs_are_taken_apart(logits: Tensor) -> None:
    criterion = made("class", "softmax")
    plain = criterion(logits, LABELS)
    assert torch.equal(criterion({"logits": logits}, {"labels": LABELS, "x": LABELS}), plain)
    assert torch.equal(criterion(logits, (torch.zeros(6, 1), LABELS)), plain)


def test_the_mask_holds_before_the_head_has_grown() -> None:
    mask = per_task_mask([(0, 1), (2, 3)], torch.tensor([0, 1]), 2)
    assert bool(mask.all())
