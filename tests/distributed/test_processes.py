"""The helper that runs functions on several processes."""

from __future__ import annotations

import pytest
import torch

from guywire.core.errors import UsageError
from guywire.testing import run_processes
from guywire.testing.processes import locate

pytestmark = pytest.mark.multiprocess


def exchange(rank, base):
    import torch.distributed as dist

    if rank == 1 and base is None:
        raise ValueError("rank 1 is unwell")
    total = torch.ones(2) * (0.0 if base is None else base + rank)
    dist.all_reduce(total)
    return {"rank": rank, "total": total, "threads": torch.get_num_threads()}


def test_results_come_back_by_rank():
    results = run_processes(exchange, 2, base=3.0)
    assert [r["rank"] for r in results] == [0, 1]
    assert all(r["total"].tolist() == [7.0, 7.0] for r in results)
    assert all(r["threads"] == 1 for r in results)


def test_a_failure_says_what_happened():
    with pytest.raises(RuntimeError, match=r"(?s)exchange failed.*rank 1 is unwell"):
        run_processes(exchange, 2, base=None)


def test_only_what_a_file_defines_can_be_found():
    with pytest.raises(UsageError, match="cannot be found by another process"):
        locate(lambda rank: None)
    with pytest.raises(UsageError, match="'dict' cannot be found"):
        locate(dict)
