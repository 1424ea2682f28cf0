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
    """softmax(z / T) = (1 + z / T + (z^2 - mean z^2) / 2T^2 + ...) / V for z of mean 0."""
    student, teacher = logits
    teacher = teacher - teacher.mean(-1, keepdim=True)
    centred = (student - student.mean(-1, keepdim=True)).detach()
    count = V * len(student)  # the loss is the mean over the batch
    limit = (centred - teacher) / count
    bend = centred.square() - teacher.square()
    bend = (bend - bend.mean(-1, keepdim=True)) / (2 * count)
    for temperature in (100.0, 1000.0):
        (gradient,) = torch.autograd.grad(term(student, teacher, temperature), student)
        torch.testing.assert_close(
            gradient, limit + bend / temperature, rtol=0.0, atol=1.0 / temperature**2
        )
        assert float((gradient - limit).abs().max()) < 2 * float(bend.abs().max()) / temperature


def test_small_logits_give_a_loss_of_the_same_scale_at_any_temperature(logits):
    student, teacher = logits[0].detach(), logits[1]
    small = [float(term(0.01 * student.detach(), 0.01 * teacher, t)) for t in (1.0, 5.0, 20.0)]
    assert small == pytest.approx([small[0]] * 3, rel=0.02)
