"""Ours: checkpoints or adapters on disk merged into a checkpoint on disk."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from protocol import serve, versions

from guywire.methods.merging import merge_checkpoints


def prepare(given):
    torch.set_num_threads(given["threads"])
    folder = Path(given["folder"])
    out = folder / "out-ours"

    def merging(method, rate):
        def run():
            start = time.perf_counter()
            merge_checkpoints(
                folder / "base",
                [folder / n for n in given["models"]],
                out,
                method=method,
                rate=rate,
                threads=given["threads"],
            )
            seconds = time.perf_counter() - start
            shutil.rmtree(out)
            return {"seconds": seconds}

        return run

    things = {method: merging(method, rate) for method, rate in given["methods"].items()}
    return things, {"versions": versions("guywire", "torch")}


if __name__ == "__main__":
    serve(prepare)
