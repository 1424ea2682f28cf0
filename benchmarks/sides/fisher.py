"""Fisher in one process: a plain pass, ours, nngeometry and BackPACK over the same samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from models import build, count, samples
from protocol import reason, serve, versions


def prepare(given):
    torch.set_num_threads(given["threads"])
    file = Path(__file__).parent.parent / "fisher.py"
    spec = importlib.util.spec_from_file_location("fisher_benchmark", file)
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    model = build(given["model"], given["width"])
    x, y = samples(given["model"], given["samples"])
    batches = list(zip(x.split(given["batch"]), y.split(given["batch"]), strict=True))
    things, notes = {}, {}
    for name, run in methods.METHODS.items():
        if name not in given.get("methods", methods.METHODS):
            continue
        try:
            run(model, batches[:1])
        except Exception as error:
            notes[name] = reason(error)
            continue
        things[name] = lambda run=run: run(model, batches)
    return things, {
        "parameters": count(model),
        "notes": notes,
        "versions": versions("guywire", "torch", "nngeometry", "backpack-for-pytorch"),
    }


if __name__ == "__main__":
    serve(prepare)
