"""Ours: a training step without and with EWC after some number of tasks."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from models import build, count, samples
from protocol import serve, versions

import guywire as gw


def prepare(given):
    torch.set_num_threads(given["threads"])
    start = build("mlp", given["width"])
    x, y = samples("mlp", given["batch"])

    def stepper(tasks: int):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        held = 0
        if tasks:
            ewc = gw.EWC(strength=1.0)
            gw.attach(model, optimizer, ewc)
            g = torch.Generator().manual_seed(0)
            for _ in range(tasks):
                for name, p in model.named_parameters():
                    importance = torch.rand(p.shape, generator=g) * 1e-3
                    ewc._add(name, importance, p.detach().clone())
                ewc.tasks_ += 1
            held = sum(
                t.numel() * t.element_size()
                for table in (ewc.mean_, ewc.precision_)
                for t in table.values()
            )

        def run():
            for _ in range(given["steps"]):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            return {"held_bytes": held}

        run()
        return run

    things = {f"ewc{k}": stepper(k) for k in given["tasks"]} | {"plain": stepper(0)}
    return things, {"parameters": count(start), "versions": versions("guywire", "torch")}


if __name__ == "__main__":
    serve(prepare)
