from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import guywire as gw
from guywire.core import losses
from guywire.core.errors import DataError


def test_masked_cross_entropy_is_the_softmax_over_the_given_classes_with_logits_at_minus_infinity():
    logits = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 4, 5, 2, 4, 5, 5])
    loss = gw.masked_cross_entropy(logits, labels, [2, 4, 5])
    masked = logits.detach().clone()
    masked[:, [0, 1, 3]] = -torch.inf
    torch.testing.assert_close(loss, F.cross_entropy(masked, labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool((gradient[:, [0, 1, 3]] == 0).all())
    assert bool((gradient[:, [2, 4, 5]] != 0).all())


def test_masked_cross_entropy_ignores_labels_of_minus_100():
    logits, labels = torch.randn(4, 3), torch.tensor([1, -100, 2, -100])
    expected = gw.masked_cross_entropy(logits[[0, 2]], labels[[0, 2]], [1, 2])
    torch.testing.assert_close(gw.masked_cross_entropy(logits, labels, [1, 2]), expected)


@pytest.mark.parametrize("label", [0, 3, 99, -1])
def test_masked_cross_entropy_names_a_label_outside_the_classes(label):
    with pytest.raises(DataError, match=f"label {label} is not among the classes"):
        gw.masked_cross_entropy(torch.zeros(2, 4), torch.tensor([1, label]), [1, 2])


def test_sigmoid_cross_entropy_sums_over_classes_and_averages_over_the_batch():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3, 2, 1])
    p = torch.sigmoid(logits)
    total = 0.0
    for i in range(5):
        for c in range(4):
            total -= float(torch.log(p[i, c] if labels[i] == c else 1 - p[i, c]))
    assert float(gw.sigmoid_cross_entropy(logits, labels)) == pytest.approx(total / 5, rel=1e-12)


def test_sigmoid_cross_entropy_over_parts_adds_up():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 3, 2, 1])
    parts = [gw.sigmoid_cross_entropy(logits, labels, part) for part in ([0, 3], [1, 2])]
    torch.testing.assert_close(sum(parts), gw.sigmoid_cross_entropy(logits, labels))


def test_sigmoid_cross_entropy_refuses_a_label_outside_the_head():
    with pytest.raises(DataError, match="label 4 lies outside the head of 4 classes"):
        gw.sigmoid_cross_entropy(torch.zeros(1, 4), torch.tensor([4]))


@pytest.mark.parametrize(
    ("classes", "words"), [([], "empty"), ([0, 9], "class 9"), ([-1], "class -1")]
)
def test_classes_outside_the_head_are_refused(classes, words):
    with pytest.raises(DataError, match=words):
        losses.only(torch.zeros(1, 4), classes)


def test_cross_entropy_of_tokens_is_the_mean_over_those_that_count():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(losses.cross_entropy(logits, labels), expected)


def test_labels_of_a_causal_language_model_are_shifted_as_in_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(7) > 4, -100)
    outputs = model(input_ids=ids, labels=labels)
    wanted = losses.cross_entropy_of(model, outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, wanted)
    assert losses.cross_entropy_of(torch.nn.Linear(1, 1), outputs.logits, labels) != wanted
