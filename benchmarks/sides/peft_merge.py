"""PEFT: two adapters merged by ``add_weighted_adapter``, from disk to disk and in memory alone.

From disk to disk is what ours does: load the base and both adapters, merge them, fold the result into
the base, save. PEFT drops and elects within the factors A and B; its ``_svd`` kinds, as ours, within
the product B A.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from peft import PeftModel
from protocol import serve, versions
from transformers import AutoModelForCausalLM


def prepare(given):
    torch.set_num_threads(given["threads"])
    folder = Path(given["folder"])
    out = folder / "out-peft"
    names = list(given["models"])

    def load():
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder / name, adapter_name=name)
        return model

    def whole(kind, rate):
        def run():
            start = time.perf_counter()
            model = load()
            add(model, kind, rate)
            model.set_adapter("both")
            model.merge_and_unload().save_pretrained(out)
            seconds = time.perf_counter() - start
            shutil.rmtree(out)
            return {"seconds": seconds}

        return run

    def add(model, kind, rate):
        with torch.no_grad():
            model.add_weighted_adapter(
                names, [0.5] * len(names), "both", combination_type=kind, density=1.0 - rate
            )

    held = load()

    def memory(kind, rate):
        def run():
            start = time.perf_counter()
            add(held, kind, rate)
            seconds = time.perf_counter() - start
            held.delete_adapter("both")
            return {"seconds": seconds}

        return run

    things = {kind: whole(kind, rate) for kind, rate in given["methods"].items()}
    things |= {f"memory {kind}": memory(kind, rate) for kind, rate in given["methods"].items()}
    return things, {"versions": versions("peft", "torch", "transformers")}


if __name__ == "__main__":
    serve(prepare)
