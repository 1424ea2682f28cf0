"""AdamR through the Hugging Face Trainer equals the same loop without it, and resumes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

from guywire.integrations.transformers import GuywireCallback  # noqa: E402

IDS = torch.randint(4, 50, (24, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": LABELS[i]}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def bert(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=3, max_position_embeddings=8,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)


def train(model, folder, regularizer, resume=None, **options):
    arguments = {
        "output_dir": str(folder), "num_train_epochs": 1, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 0.0, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "optim": "adamw_torch", "logging_strategy": "no", "seed": 0,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip
    callback = GuywireCallback(regularizer)
    trainer = InOrder(
        model, transformers.TrainingArguments(**arguments), train_dataset=Rows(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    callback.detach()


def method(base):
    anchors = {n: p.detach().clone() for n, p in base.named_parameters() if "classifier" not in n}
    return gw.AdamR(0.05, anchor=anchors, select="!classifier.*")


def test_through_the_trainer_equals_a_plain_loop(tmp_path):
    looped, trained, base = bert(), bert(), bert(1)
    train(trained, tmp_path, method(base))
    optimizer = torch.optim.AdamW(looped.parameters(), lr=0.01, weight_decay=0.0)
    looped.train()
    with gw.attach(looped, optimizer, method(base)):
        for start in range(0, 24, 4):
            optimizer.zero_grad()
            logits = looped(input_ids=IDS[start : start + 4]).logits
            nn.functional.cross_entropy(logits, LABELS[start : start + 4]).backward()
            optimizer.step()
    for (n, a), (_, b) in zip(looped.named_parameters(), trained.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    free = bert()
    train(free, tmp_path, gw.AdamR(0.0))
    moved = (free.bert.pooler.dense.weight - trained.bert.pooler.dense.weight).detach().abs()
    assert float(moved.max()) > 1e-3


def test_the_trainer_resumes_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, again, base = bert(), bert(5), bert(1)
    train(whole, tmp_path, method(base), **options)
    train(again, tmp_path, method(base), resume=str(tmp_path / "checkpoint-3"), **options)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
