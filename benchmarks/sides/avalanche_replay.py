"""Avalanche: an epoch of a plain loop, of its Naive strategy, and of that with its ReplayPlugin."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from models import build, count, samples
from protocol import serve, versions
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Tasks(TensorDataset):
    """Samples with the attributes that Avalanche looks for."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.targets = y.tolist()


def prepare(given):
    torch.set_num_threads(given["threads"])
    start = build("mlp", given["width"])
    data = [Tasks(*samples("mlp", given["samples"], seed)) for seed in (0, 1)]
    stream = benchmark_from_datasets(
        train=[as_classification_dataset(d) for d in data]
    ).train_stream

    def plain():
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loader = DataLoader(data[1], batch_size=given["batch"], shuffle=True)

        def run():
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

        run()
        return run

    def strategy(plugins):
        model = copy.deepcopy(start)
        found = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=given["batch"],
            train_epochs=1,
            device="cpu",
            plugins=plugins,
            evaluator=EvaluationPlugin(loggers=[]),
            eval_every=-1,
        )
        found.train(stream[0])
        found.train(stream[1])

        def run():
            found.train(stream[1])

        return run

    things = {
        "plain": plain(),
        "naive": strategy([]),
        "replay": strategy([ReplayPlugin(mem_size=given["capacity"])]),
    }
    return things, {"parameters": count(start), "versions": versions("avalanche-lib", "torch")}


if __name__ == "__main__":
    serve(prepare)
