"""Avalanche: the importances of its EWCPlugin, at the training batch size and at a batch of one.

It squares the gradient of each batch's mean, which is the Fisher's diagonal at a batch of one only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from avalanche.training.plugins import EWCPlugin
from models import build, count, samples
from protocol import serve, versions
from torch import nn


def prepare(given):
    torch.set_num_threads(given["threads"])
    model = build(given["model"], given["width"])
    x, y = samples(given["model"], given["samples"])
    data = torch.utils.data.TensorDataset(x, y, torch.zeros_like(y))
    batches = list(zip(x.split(given["batch"]), y.split(given["batch"]), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plugin, criterion = EWCPlugin(1.0), nn.CrossEntropyLoss()

    def importances(size):
        return plugin.compute_importances(model, criterion, optimizer, data, "cpu", size)

    def plain():
        model.eval()
        for a, b in batches:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(a), b).backward()

    def flat(found):
        return torch.cat([v.data.flatten() for v in found.values()]).double()

    right, fast = flat(importances(1)), flat(importances(given["batch"]))
    quality = {
        "share_of_sum": float(fast.sum() / right.sum()),
        "cosine": float(F.cosine_similarity(fast, right, dim=0)),
    }

    def at(size):
        def run():
            importances(size)

        return run

    things = {"plain": plain, "avalanche": at(given["batch"]), "avalanche1": at(1)}
    about = {"parameters": count(model), "versions": versions("avalanche-lib", "torch")}
    return things, about | {"quality": quality}


if __name__ == "__main__":
    serve(prepare)
