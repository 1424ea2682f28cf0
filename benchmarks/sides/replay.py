"""Ours: an epoch without and with Replay, from a memory that an earlier task filled."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from models import build, count, samples
from protocol import serve, versions
from torch.utils.data import DataLoader, TensorDataset

import guywire as gw


def prepare(given):
    torch.set_num_threads(given["threads"])
    start = build("mlp", given["width"])
    loaders = [
        DataLoader(
            TensorDataset(*samples("mlp", given["samples"], seed)),
            batch_size=given["batch"],
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        for seed in (0, 1)
    ]

    def epoch(kind):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        wires = gw.attach(model, optimizer, gw.Replay(given["capacity"])) if kind else None

        def run(loader=loaders[1]):
            for batch in loader:
                optimizer.zero_grad()
                outputs = model(batch[0])
                loss = F.cross_entropy(outputs, batch[1])
                if wires is not None:
                    loss = loss + wires.loss(batch, outputs)
                loss.backward()
                optimizer.step()

        run(loaders[0])
        run()
        return lambda: run()

    things = {"plain": epoch(""), "replay": epoch("replay")}
    return things, {"parameters": count(start), "versions": versions("guywire", "torch")}


if __name__ == "__main__":
    serve(prepare)
