"""Ours, at one number of parameters: the pulls, a copy of the parameters, the Fisher, a plain pass."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from models import count, mlp
from protocol import serve, versions

import guywire as gw
from guywire.core.regularizer import Step
from guywire.curvature import diagonal_fisher


def prepare(given):
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    width = given["width"]
    model = mlp(width, inputs=width, classes=10).eval()
    batch, rounds = given["batch"], given["rounds"]
    x, y = torch.randn(batch, width), torch.randint(10, (batch,))
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    step = Step(optimizer)
    copies = [p.detach().clone() for p in params]
    l2, ewc = gw.L2(1.0), gw.EWC(1.0)
    gw.attach(model, optimizer, l2)
    gw.attach(model, optimizer, ewc)
    for name, p in model.named_parameters():
        ewc._add(name, torch.rand_like(p) * 1e-3, p.detach().clone())
    ewc.tasks_ = 1

    def grads():
        for p in params:
            if p.grad is None:
                p.grad = torch.full_like(p, 1e-3)

    def copy():
        for _ in range(rounds):
            for to, p in zip(copies, params, strict=True):
                to.copy_(p.detach())

    def pull(regularizer):
        def run():
            with torch.no_grad():
                for _ in range(rounds):
                    regularizer.before_step(step)

        return run

    def plain():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    def fisher():
        model.zero_grad(set_to_none=True)
        diagonal_fisher(model, [(x, y)], labels="true")

    def with_grads(run):
        # the gradients that a plain pass dropped are made anew outside of the clock
        def go():
            grads()
            start = time.perf_counter()
            run()
            return {"seconds": time.perf_counter() - start}

        return go

    things = {
        "copy": copy,
        "l2": with_grads(pull(l2)),
        "ewc": with_grads(pull(ewc)),
        "plain": plain,
        "fisher": fisher,
    }
    for run in things.values():
        run()
    return things, {"parameters": count(model), "versions": versions("guywire", "torch")}


if __name__ == "__main__":
    serve(prepare)
