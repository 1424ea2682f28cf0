"""Several processes: each has its own part of the data, all get the Fisher information of the whole.

Under FSDP2 every forward and backward pass communicates, so all processes make the same number of
them: one that has run out of batches repeats its last one without counting it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from guywire.core.processes import data_parallel, is_sharded

__all__ = ["Processes"]


class Processes:
    """How this process works together with others, if it does.

    Args:
        model: as the user passed it: wrapped by DDP, sharded by FSDP2, or neither.
    """

    def __init__(self, model: nn.Module) -> None:
        up = distributed.is_available() and distributed.is_initialized()
        ddp = data_parallel(model) if up else None
        self.sharded = up and is_sharded(model)
        self.together = self.sharded or ddp is not None
        self.group: Any = None if ddp is None else ddp.process_group

    def most(self, value: int) -> int:
        """Return the largest of a number over the processes, where they move in step (FSDP2).

        Args:
            value: this process's number.

        Returns:
            The largest; the number itself where each process goes on alone.
        """
        if not self.sharded:
            return value
        device = "cpu" if distributed.get_backend(self.group) == "gloo" else "cuda"
        held = torch.tensor(value, device=device)
        distributed.all_reduce(held, op=distributed.ReduceOp.MAX, group=self.group)
        return int(held)

    def any(self, flag: bool) -> bool:
        """Say whether a flag is set on any process that moves in step with this one.

        Args:
            flag: this process's.

        Returns:
            The answer.
        """
        return bool(self.most(int(flag)))

    def shard(self, total: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's part of a sum over processes, sharded as the parameter is.

        Args:
            total: of the full shape, this process's contribution.
            parameter: a DTensor.

        Returns:
            A DTensor with the parameter's placements.
        """
        from torch.distributed.tensor import DTensor, Partial

        mesh = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
        whole = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
        return whole.redistribute(mesh, parameter.placements)  # pyright: ignore[reportAttributeAccessIssue]
