"""Avalanche: a training step without and with its EWCPlugin after some number of tasks.

The plugin's own ``before_backward`` is called in a plain loop, with a stand-in for the strategy that
holds what it reads; so nothing of Avalanche's own loop is timed, which is to its advantage.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from avalanche.training.plugins import EWCPlugin
from avalanche.training.utils import ParamData
from models import build, count, samples
from protocol import serve, versions


def prepare(given):
    torch.set_num_threads(given["threads"])
    start = build("mlp", given["width"])
    x, y = samples("mlp", given["batch"])
    g = torch.Generator().manual_seed(0)

    def data(name, value):
        return ParamData(name, value.shape, init_tensor=value, device="cpu")

    saved, importances = [], []
    for _ in range(max(given["tasks"])):
        named = dict(start.named_parameters())
        saved.append({n: data(n, p.detach().clone()) for n, p in named.items()})
        importances.append(
            {n: data(n, torch.rand(p.shape, generator=g) * 1e-3) for n, p in named.items()}
        )

    def stepper(tasks: int, mode: str = "separate"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        plugin = EWCPlugin(1.0, mode=mode, decay_factor=None if mode == "separate" else 0.9)
        kept = range(tasks) if mode == "separate" else range(max(tasks - 1, 0), tasks)
        plugin.saved_params.update({t: saved[t] for t in kept})
        plugin.importances.update({t: importances[t] for t in kept})
        held = sum(
            v.data.numel() * v.data.element_size()
            for table in (plugin.saved_params, plugin.importances)
            for t in table.values()
            for v in t.values()
        )
        strategy = SimpleNamespace(
            clock=SimpleNamespace(train_exp_counter=tasks), device="cpu", model=model, loss=None
        )

        def run():
            for _ in range(given["steps"]):
                optimizer.zero_grad()
                strategy.loss = F.cross_entropy(model(x), y)
                plugin.before_backward(strategy)
                strategy.loss.backward()
                optimizer.step()
            return {"held_bytes": held}

        run()
        return run

    things = {f"ewc{k}": stepper(k) for k in given["tasks"]} | {"plain": stepper(0)}
    things |= {"online": stepper(max(given["tasks"]), "online")}
    return things, {"parameters": count(start), "versions": versions("avalanche-lib", "torch")}


if __name__ == "__main__":
    serve(prepare)
