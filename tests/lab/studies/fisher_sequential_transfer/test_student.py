"""The paper's student term, T^2 KL(softmax(teacher/T) || softmax(student/T)), from the library's loss."""

from __future__ import annotations

import pytest
import torch

import guywire as gw

V = 7


def term(student, teacher, temperature):
    crossed = gw.prediction_distillation_loss(student, teacher, temperature=temperature)
    entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy().mean()
    return temperature**2 * (crossed - entropy)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_it_is_torchs_kl_and_zero_where_both_agree(logits, temperature):
    student, teacher = logits
    kl = torch.nn.functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert term(student, teacher, temperature).item() == pytest.approx(temperature**2 * kl.item())
    assert term(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-9)


def test_hot_softmaxes_pull_logits_together(logits):
    student, teacher = logits
    teacher = teacher - teacher.mean(-1, keepdim=True)
    centred = student - student.mean(-1, keepdim=True)
    limit = (centred - teacher).detach() / V / len(student)  # the mean over the batch
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        (gradient,) = torch.autograd.grad(term(student, teacher, temperature), student)
        errors.append(float((gradient - limit).abs().max()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1]
    assert errors[2] < 1e-3 * float(limit.abs().max())


def test_small_logits_give_a_loss_of_the_same_scale_at_any_temperature(logits):
    student, teacher = logits
    small = [float(term(0.01 * student, 0.01 * teacher, t)) for t in (1.0, 5.0, 20.0)]
    assert small == pytest.approx([small[0]] * 3, rel=0.02)
