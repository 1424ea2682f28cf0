"""State under FSDP2: with torch.distributed.checkpoint, and gathered into one ordinary tree.

``torch.distributed.checkpoint`` (DCP) writes each process's shards and gives them to another number
of processes. It reads only into tensors that are there already, so a regularizer that has learnt
nothing yet would silently get nothing: :func:`sharded_state` first asks the checkpoint what it
holds and makes room for that, sharded like the parameters.

What is not a tensor travels as JSON in a tensor of bytes, so nothing of ours is unpickled. (DCP's
own ``.metadata`` file is a pickle: load folders that you trust.)
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import checkpoint, selection, tensors
from guywire.core.attach import Wires
from guywire.core.errors import CheckpointError

__all__ = ["ShardedState", "gathered", "sharded_state"]

_TREE = "tree"
_TENSORS = "tensors"


def sharded_state(
    wires: Wires, folder: str | os.PathLike[str] | Any = None, *, key: str = "wires"
) -> ShardedState:
    """Return the state of wires for ``torch.distributed.checkpoint``, to be saved or loaded.

    Anchors and importances are DTensors, sharded like their parameters: each process writes and
    reads its own shards, and the number of processes may differ between the two, one without a
    process group included. Every process must take part.

    With a method that freezes parameters (half fine-tuning) load the wires before you ask
    ``get_state_dict`` for the optimiser's state: they say which parameters have one.

    Args:
        wires: attached, when loading to the model as it was when saved.
        folder: to load from: the folder given to ``dcp.load`` as ``checkpoint_id``, or its
            ``StorageReader``. ``None`` to save.
        key: the one under which it stands in the dict given to ``dcp.save`` and ``dcp.load``.

    Returns:
        An object of DCP's ``Stateful`` protocol. Errors come when DCP asks it for its state:
        :class:`~guywire.core.errors.CheckpointError` if the checkpoint holds no state of wires
        under the key, or of other regularizers; or if a memory of samples, which differs between
        processes, would be saved from one of several.

    Example:
        >>> import tempfile, warnings
        >>> import guywire as gw
        >>> import torch.distributed.checkpoint as dcp
        >>> warnings.simplefilter("ignore")  # DCP warns where there is one process
        >>> folder = tempfile.mkdtemp()
        >>> def start():
        ...     model = nn.Linear(2, 2)
        ...     return gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), gw.EWC())
        >>> wires = start()
        >>> wires.consolidate([(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))])
        >>> _ = dcp.save({"wires": gw.sharded_state(wires)}, checkpoint_id=folder)
        >>> again = start()
        >>> dcp.load({"wires": gw.sharded_state(again, folder)}, checkpoint_id=folder)
        >>> again.regularizers[0].tasks_
        1
    """
    return ShardedState(wires, folder, key)


class ShardedState:
    """What :func:`sharded_state` returns."""

    def __init__(self, wires: Wires, folder: Any, key: str) -> None:
        self.wires, self.folder, self.key = wires, folder, key

    def state_dict(self) -> dict[str, Any]:
        """Return a dict for DCP: what to save, or room for what the folder holds.

        Returns:
            ``tree``, JSON as bytes in a tensor, and ``tensors`` by their place in the tree.
        """
        return self._state() if self.folder is None else self._room()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the wires what DCP has read.

        Args:
            state: of the form that ``state_dict`` gives.

        Raises:
            CheckpointError: it makes no sense, or belongs to other regularizers.
        """
        if self.folder is None:
            raise CheckpointError(
                "these wires have no room for what a checkpoint holds: load into "
                "sharded_state(wires, folder)"
            )
        tree = checkpoint._unpack(_decode(state[_TREE]), state.get(_TENSORS, {}))
        self.wires.load_state_dict(tree)

    def _state(self) -> dict[str, Any]:
        from torch import distributed

        several = (
            distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        )
        own = [type(r).__name__ for r in self.wires.regularizers if r.per_process]
        if several and own:
            raise CheckpointError(
                f"{own[0]} keeps samples that differ between processes, and DCP would keep those "
                "of one: let each process save gw.gathered(wires.state_dict()) with "
                "guywire.core.checkpoint to a file of its own"
            )
        held: dict[str, Tensor] = {}
        text = json.dumps(_pack(self.wires.state_dict(), "", held), separators=(",", ":"))
        tree = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return {_TREE: tree, _TENSORS: held}

    def _room(self) -> dict[str, Any]:
        import torch.distributed.checkpoint as dcp

        reader: Any = self.folder
        if isinstance(reader, str | os.PathLike):
            reader = dcp.FileSystemReader(Path(reader))
        try:
            held = reader.read_metadata().state_dict_metadata
        except OSError as error:
            raise CheckpointError(
                f"there is no checkpoint of torch.distributed in {self.folder}"
            ) from error
        name = f"{self.key}.{_TREE}"
        if name not in held:
            others = sorted(n[: -len(_TREE) - 1] for n in held if n.endswith(f".{_TREE}"))
            hint = f"; there is one under {others[0]!r}: give that as key=" if others else ""
            raise CheckpointError(
                f"the checkpoint {self.folder} holds no state of wires under {self.key!r}{hint}"
            )
        tree = torch.empty(held[name].size, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads for itself is meant
            dcp.load({self.key: {_TREE: tree}}, storage_reader=reader, no_dist=True)
        params = selection.named_parameters(self.wires.model)
        start = f"{self.key}.{_TENSORS}."
        room = {
            full[len(start) :]: _empty_like(meta, params.get(full.rsplit("/", 1)[-1]))
            for full, meta in held.items()
            if full.startswith(start)
        }
        return {_TREE: tree, _TENSORS: room}


def gathered(tree: checkpoint.Tree) -> checkpoint.Tree:
    """Return a tree in which every sharded tensor is whole, on the CPU, on every process.

    For ``core.checkpoint.save``, which writes ordinary tensors: without this a process has only its
    own shards. Every process must call it, with the same tree; one of them saves. A whole copy must
    fit into the memory of each process: for large models use :func:`sharded_state`.

    Args:
        tree: such as ``{"model": model.state_dict(), "wires": wires.state_dict()}``.

    Returns:
        The tree; ordinary tensors are those of the tree itself.

    Example:
        >>> gathered({"steps": 3, "mean": [torch.ones(2)]})
        {'steps': 3, 'mean': [tensor([1., 1.])]}
    """
    return _mapped(tree, _whole)


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [_mapped(value, change) for value in tree]
        return values if isinstance(tree, list) else tuple(values)
    return tree


def _whole(tensor: Tensor) -> Tensor:
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor

    # Anew, since a tensor kept on the CPU must be where its mesh communicates.
    whole = DTensor.from_local(
        tensors.local(tensor),
        mesh,
        tensor.placements,  # pyright: ignore[reportAttributeAccessIssue]
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return whole.full_tensor().cpu()


def _pack(value: Any, where: str, held: dict[str, Tensor]) -> Any:
    """Turn a tree into JSON as ``core.checkpoint`` does, sharded tensors allowed."""
    if isinstance(value, Tensor):
        held[where] = value.detach()
        return {"tensor": where}
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    below = f"{where}/" if where else ""
    if isinstance(value, Mapping):
        return {"dict": [[k, _pack(v, f"{below}{k}", held)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{below}{i}", held) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    raise CheckpointError(f"{where} is a {type(value).__name__}, which no checkpoint holds")


def _decode(tree: Tensor) -> Any:
    try:
        return json.loads(bytes(tree.numpy()))
    except ValueError as error:
        raise CheckpointError(
            "the state of the wires in this checkpoint is damaged: it cannot be read"
        ) from error


def _empty_like(meta: Any, parameter: nn.Parameter | None) -> Tensor:
    dtype, shape = meta.properties.dtype, meta.size
    if parameter is None or parameter.shape != shape:
        return torch.empty(shape, dtype=dtype)
    return torch.empty_like(parameter.detach(), dtype=dtype)
