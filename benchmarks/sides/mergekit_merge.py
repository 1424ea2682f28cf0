"""mergekit: checkpoints on disk merged into a checkpoint on disk, by its own ``run_merge``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from protocol import serve, versions


def prepare(given):
    torch.set_num_threads(given["threads"])
    folder = Path(given["folder"])
    out = folder / "out-mergekit"

    def merging(method, rate):
        config = MergeConfiguration.model_validate(
            {
                "models": [
                    {
                        "model": str(folder / n),
                        "parameters": {"weight": 0.5, "density": 1.0 - rate},
                    }
                    for n in given["models"]
                ],
                "merge_method": method,
                "base_model": str(folder / "base"),
                "dtype": "bfloat16",
            }
        )
        options = MergeOptions(
            copy_tokenizer=False, num_threads=given["threads"], quiet=True, random_seed=0
        )

        def run():
            start = time.perf_counter()
            run_merge(config, str(out), options)
            seconds = time.perf_counter() - start
            shutil.rmtree(out)
            return {"seconds": seconds}

        return run

    things = {method: merging(method, rate) for method, rate in given["methods"].items()}
    return things, {"versions": versions("mergekit", "torch", "transformers")}


if __name__ == "__main__":
    serve(prepare)
