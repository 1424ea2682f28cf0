"""Where anchors and importances are kept: beside the parameters, in the CPU's memory, or on disk.

On disk they are a safetensors file that is mapped into memory: the system reads pages when a pull
comes by and drops them when memory is short, so what a process needs is the block that it works on.
Files are written tensor by tensor, in rename-at-the-end fashion. Under FSDP2 each process keeps its
own shards, in a file of its own.

Without a folder the file is removed as soon as it is mapped: it takes space until nobody uses it any
more, and nothing stays behind, even if the process is killed. It lies where ``tempfile`` puts
things (``TMPDIR``), which on some machines is memory: name a folder there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from guywire.core import headers, tensors, writing
from guywire.core.errors import CheckpointError, UsageError
from guywire.core.tensors import Tensors

__all__ = ["Item", "Keep", "Shelf"]

Keep = Literal["cpu", "disk"] | os.PathLike[str] | None
"""``None``: beside the parameters; ``"cpu"``; ``"disk"``: in a nameless file; or a folder (a
``pathlib.Path``) that gets the files."""

_PIECE = 1 << 22
"""Elements that are converted, or fetched from a GPU, at a time while a file is written."""


@dataclass(frozen=True)
class Item:
    """A tensor that is to be kept.

    Attributes:
        like: what it belongs to: says the shape, and how it is sharded.
        dtype: of what is kept.
        make: gives the tensor, sharded like ``like``; called once, when its turn comes.
        fresh: whether nobody else has what ``make`` gives, so that it need not be copied.
    """

    like: Tensor
    dtype: torch.dtype
    make: Callable[[], Tensor]
    fresh: bool = False


class Shelf:
    """Keeps tensors in one place.

    Args:
        keep: where.
        name: of the files in a folder.

    Raises:
        UsageError: there is no such place.
    """

    def __init__(self, keep: Keep, name: str) -> None:
        if not (keep is None or keep in ("cpu", "disk") or isinstance(keep, os.PathLike)):
            raise UsageError(
                f"keep={keep!r} is none of 'cpu', 'disk', a pathlib.Path of a folder, and None"
            )
        if isinstance(keep, os.PathLike) and not Path(keep).is_dir():
            raise UsageError(f"keep={keep!r} is no folder: make it first")
        self.keep, self.name = keep, name

    def put(self, items: Mapping[str, Item]) -> Tensors:
        """Keep tensors; what was there before is let go when nobody uses it any more.

        Args:
            items: names to what is to be kept.

        Returns:
            Names to tensors, sharded like what they belong to: on its device, on the CPU, or views
            of a file.
        """
        if self.keep is None:
            return {name: _copied(item) for name, item in items.items()}
        if self.keep == "cpu":
            return {name: _on_cpu(item) for name, item in items.items()}
        return self._written(items)

    def holds(self, tensor: Tensor, like: Tensor) -> bool:
        """Tell whether a tensor that was kept before can stay for a parameter.

        Args:
            tensor: as :meth:`put` gave it.
            like: the parameter.

        Returns:
            False where it must be put again: the parameter is sharded otherwise, say.
        """
        if self.keep is None:
            return False
        layout = [
            (getattr(t, "device_mesh", None), getattr(t, "placements", None))
            for t in (tensor, like)
        ]
        return layout[0] == layout[1]

    def _written(self, items: Mapping[str, Item]) -> Tensors:
        rows = [
            (name, headers.NAMES[item.dtype], tuple(tensors.local(item.like).shape))
            for name, item in items.items()
        ]
        table, size = headers.table_of(headers.wide_first(rows))
        header = headers.encode(table)

        def write(file: Any) -> None:
            file.write(header)
            for name in table:
                for piece in _pieces(items[name]):
                    file.write(piece)

        storage = self._mapped(write, len(header) + size)
        kept: Tensors = {}
        for name, item in items.items():
            shape = tensors.local(item.like).shape
            begin = len(header) + table[name]["data_offsets"][0]
            raw = torch.empty(0, dtype=torch.uint8).set_(  # pyright: ignore[reportCallIssue]
                storage, begin, (shape.numel() * item.dtype.itemsize,)
            )
            kept[name] = _sharded(raw.view(item.dtype).view(shape), item.like)
        return kept

    def _mapped(self, write: Callable[[Any], None], size: int) -> Any:
        if self.keep == "disk":
            try:
                with tempfile.NamedTemporaryFile(prefix="guywire-", suffix=".safetensors") as file:
                    write(file)
                    file.flush()
                    return torch.UntypedStorage.from_file(file.name, False, size)
            except OSError as error:
                raise CheckpointError(
                    f"cannot keep {self.name} in {tempfile.gettempdir()}: {error.strerror or error}: "
                    "free some space, set TMPDIR, or give keep=Path(folder)"
                ) from error
        assert isinstance(self.keep, os.PathLike)
        path = Path(self.keep) / f"{self.name}-{_who()}.safetensors"
        with writing.replacing(path) as file:
            write(file)
        return torch.UntypedStorage.from_file(str(path), False, size)


def _who() -> str:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return "0-of-1"
    return f"{distributed.get_rank()}-of-{distributed.get_world_size()}"


def _copied(item: Item) -> Tensor:
    made = item.make().detach()
    made = made if item.fresh else made.clone()
    return made.to(item.dtype)


def _on_cpu(item: Item) -> Tensor:
    made = tensors.local(item.make())
    copy = not item.fresh and made.device.type == "cpu" and made.dtype == item.dtype
    here = made.clone() if copy else made.to("cpu", item.dtype)
    if tensors.local(item.like).is_cuda:
        here = here.pin_memory()
    return _sharded(here, item.like)


def _pieces(item: Item) -> Iterator[memoryview]:
    made = tensors.local(item.make())
    if made.shape != tensors.local(item.like).shape:
        raise CheckpointError(
            f"a tensor of the shape {tuple(made.shape)} is to be kept where "
            f"{tuple(tensors.local(item.like).shape)} is due"
        )
    if made.numel() == 0:
        return
    # Piece by piece: converting or copying from a GPU then takes a piece at a time.
    flat = made.reshape(-1) if made.is_contiguous() else made.contiguous().view(-1)
    for piece in flat.split(_PIECE):
        here = piece.to("cpu", item.dtype)
        yield here.view(torch.uint8).numpy().data


def _sharded(local: Tensor, like: Tensor) -> Tensor:
    """Return a local tensor as the part of a sharded one that it is, on whatever device it lies."""
    if not hasattr(like, "device_mesh"):
        return local
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # DTensor.from_local would move it to the mesh's device; FSDP2 builds its off-loaded ones so.
    mesh, placements = like.device_mesh, like.placements  # pyright: ignore[reportAttributeAccessIssue]
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    spec = DTensorSpec(mesh, placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
