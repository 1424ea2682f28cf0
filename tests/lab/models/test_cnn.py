from __future__ import annotations

import pytest
import torch
from torch import nn

from guywire.lab.models.cnn import CNN
from guywire.lab.models.mlp import MLP


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 33, 47)])
def test_features_of_images_of_many_sizes(shape):
    net = CNN(shape)
    features = net(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 160)
    assert features.isfinite().all()


def test_base_64_is_as_large_as_resnet18():
    # ResNet-18 for small RGB images, without its last layer: 11.17M parameters, with a norm of
    # two parameters a channel after each of its 20 convolutions.
    net = CNN((3, 32, 32), base=64)
    assert sum(p.numel() for p in net.parameters()) == 11_168_832
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 20


def test_samples_do_not_depend_on_their_batch_and_nothing_drifts():
    net = CNN((3, 16, 16)).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = net(x)
    alone = torch.cat([net(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    assert not list(net.buffers())


def test_signals_keep_their_size_through_the_layers():
    net = CNN((3, 32, 32), base=64)
    features = net(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < features.std() < 10


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 8, 8), 100), ((1, 16, 16), 256), ((3, 64, 64), 400)]
)
def test_the_mlp_is_as_wide_as_its_input_within_bounds(shape, width):
    net = MLP(shape)
    assert net.width == width
    assert net(torch.zeros(2, *shape)).shape == (2, width)
    assert sum(isinstance(m, nn.Linear) for m in net.modules()) == 2
