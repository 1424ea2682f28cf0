"""The Hugging Face Trainer under DDP, on two gloo processes: it ends where one process ends."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import guywire as gw
from guywire.testing import run_processes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.multiprocess

from guywire.integrations.transformers import GuywireCallback  # noqa: E402

LABELS = 3


class Rows(torch.utils.data.Dataset):
    """Sequences of 5 tokens; of two processes, one gets only those with the label 0."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, 50, (24, 5), generator=generator)
        self.labels = torch.randint(1, LABELS, (24,), generator=generator)
        self.labels[torch.arange(24) // 2 % 2 == 0] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=LABELS, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


METHODS = {
    "EWC": lambda: gw.EWC(strength=30.0, labels="true"),
    "HalfFineTuning": lambda: gw.HalfFineTuning(seed=0),
    "GEM": lambda: gw.GEM(memory_per_task=24, margin=0.1),
    "PredictionDistillation": lambda: gw.PredictionDistillation(3.0),
}


def train(name, folder, count):
    """Two tasks, each with a Trainer of its own."""
    model, method = bert(), METHODS[name]()
    for task in (1, 2):
        settings = {
            "output_dir": folder, "num_train_epochs": 2, "learning_rate": 0.02,
            "per_device_train_batch_size": 4 // count, "lr_scheduler_type": "constant",
            "weight_decay": 0.0, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": [],
            "disable_tqdm": True, "use_cpu": True, "optim": "sgd", "logging_strategy": "no",
            "seed": 0, "dataloader_pin_memory": False, "remove_unused_columns": False,
        }  # fmt: skip
        callback = GuywireCallback(method)

        def loss(outputs, labels, num_items_in_batch=None, callback=callback):
            own = F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
            return own + callback.loss(outputs, labels, num_items_in_batch)

        trainer = InOrder(
            model,
            transformers.TrainingArguments(**settings),
            train_dataset=Rows(task),
            callbacks=[callback],
            compute_loss_func=loss,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        if task == 1:
            callback.consolidate(trainer.get_train_dataloader())
        else:
            callback.detach()
    saved = method.state_dict()
    saved.pop("memories", None)  # each process's own
    return {"model": dict(model.state_dict()), "method": saved}


def in_two(rank, folder):
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for; the group is there
    return {name: train(name, f"{folder}/{rank}", 2) for name in METHODS}


@pytest.fixture(scope="module")
def found_in_two(tmp_path_factory):
    return run_processes(in_two, 2, folder=str(tmp_path_factory.mktemp("two")))


def assert_alike(found, wanted):
    found, wanted = (pytree.tree_flatten(tree) for tree in (found, wanted))
    assert found[1] == wanted[1]
    for a, b in zip(found[0], wanted[0], strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        else:
            assert a == b


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_two_processes_equal_one(found_in_two, name, tmp_path):
    one = train(name, str(tmp_path), 1)
    start = bert().state_dict()
    assert any(not torch.allclose(one["model"][key], start[key]) for key in start)
    for found in (results[name] for results in found_in_two):
        torch.testing.assert_close(found["model"], one["model"], rtol=1e-7, atol=1e-9)
        assert_alike(found["method"], one["method"])
